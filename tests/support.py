"""What tests in several folders use: a full disk, other processes, and a look at what lies in a folder."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from scm_runtime.ort.native_ops import find_library

ROOT = Path(__file__).parents[1]

# What this processor has for bfloat16, by the flags that Linux lists.
CPUINFO = Path("/proc/cpuinfo")
FEATURES = set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()
BFLOAT16 = {"avx512_bf16", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= FEATURES
MATRIX_UNITS = BFLOAT16 and {"amx_tile", "amx_bf16"} <= FEATURES

# Put before a program: importing any of sys.argv[1] (comma-separated) fails, as if it were not to be touched.
BLOCK_IMPORTS = """
import sys

class Block:
    names = set(sys.argv[1].split(","))
    error = AssertionError

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in cls.names:
            raise cls.error(f"{name} was imported")

sys.meta_path.insert(0, Block)
"""


def native_library() -> Path:
    """The library of kernels; skips the test where there is none, unless SCM_REQUIRE_OPS says that there must be."""
    library = find_library()
    if library is None:
        (pytest.fail if os.environ.get("SCM_REQUIRE_OPS") else pytest.skip)("there is no library of native kernels: make ops")
    return library.path


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Within the block no file can grow beyond ``room`` bytes: a write fails with EFBIG, as it does with ENOSPC on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # Python ignores the signal that goes with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run_python(
    program: str, *arguments: str | Path, check: bool = True, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter of this environment. With ``check``, a failure shows what it printed."""
    return run([sys.executable, "-c", program, *map(str, arguments)], check=check, cwd=cwd, env=env)


def run(command: Sequence[str | Path], *, check: bool = True, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command and catch what it prints. With ``check``, a failure shows it."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=600, cwd=cwd, env=env)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}\nended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: bytes of the files, targets of the links, None for folders."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
