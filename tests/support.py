"""Helpers for tests in several folders: recognize the stub of a GPU, simulate a full disk, run subprocesses, read the contents of a folder."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from scm_runtime.ort.native_ops import find_library

ROOT = Path(__file__).parents[1]

# Whether the processor has bfloat16 instructions, from the flags in /proc/cpuinfo, and those with which the library's float32 convolutions are compiled.
CPUINFO = Path("/proc/cpuinfo")
FEATURES = set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()
AVX512 = {"avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= FEATURES
BFLOAT16 = AVX512 and "avx512_bf16" in FEATURES
CONVOLUTION_ISAS = ["avx2"] * ({"avx2", "fma"} <= FEATURES) + ["avx512"] * AVX512 or [""] * (platform.machine() in ("aarch64", "arm64"))
KERNEL_ISAS = ["generic", *CONVOLUTION_ISAS] + ["avx512_bf16"] * BFLOAT16 + ["amx"] * (BFLOAT16 and {"amx_tile", "amx_bf16"} <= FEATURES)
"""Values of SCM_OPS_MAX_ISA: for those convolutions, and for all kernels."""

# Beginning of a program in which every import of a module named in sys.argv[1] (comma-separated) fails.
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


@cache
def on_stub() -> bool:
    """Return True if the NVIDIA driver is the stub of tests/stub. Its kernels compute nothing, so values are not compared."""
    try:
        return hasattr(ctypes.CDLL("libcuda.so.1"), "scm_stub_mark")
    except OSError:
        return False


def native_library() -> Path:
    """Return the path of the native kernel library. If it is missing, skip the test, or fail it if SCM_REQUIRE_OPS is set."""
    library = find_library()
    if library is None:
        (pytest.fail if os.environ.get("SCM_REQUIRE_OPS") else pytest.skip)("the native kernel library is missing: run make ops")
    return library.path


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Context manager that simulates a full disk: no file can grow beyond ``room`` bytes. Writes fail with EFBIG instead of ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # the kernel also sends SIGXFSZ, which Python ignores
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run_python(
    program: str, *arguments: str | Path, check: bool = True, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program in a new interpreter of this environment. With ``check``, a failure raises AssertionError with the output."""
    return run([sys.executable, "-c", program, *map(str, arguments)], check=check, cwd=cwd, env=env)


def run(command: Sequence[str | Path], *, check: bool = True, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output. With ``check``, a failure raises AssertionError with the output."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=600, cwd=cwd, env=env)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}\nfailed with exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """Return everything below a folder by relative path: contents of files, targets of symbolic links, None for folders."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
