"""The stages of ``make first-gpu``: commands, the time that each may take, and the stages that it needs."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
CUDA_FOLDER = "/usr/local/cuda/bin"
Command = list[str]


@dataclass(frozen=True)
class Stage:
    """One part of the run. Its commands run one after another."""

    name: str
    commands: tuple[Command, ...]
    limit_s: float
    """The time after which the stage is ended."""
    needs: tuple[str, ...] = ()
    """Stages without which this one cannot run."""
    unavailable: str | None = None
    """Why the stage cannot run on this machine."""
    expects: str = ""
    """What the output must hold, besides an exit code of 0: pytest succeeds if it skips every test."""


@dataclass(frozen=True)
class Plan:
    """What is run where."""

    sizes: tuple[str, ...]
    """Sizes of EDM2, each with a bundle of random weights."""
    capability: int
    """Of the GPU, without the dot: 90."""
    results: Path
    """Folder of the results."""
    work: Path
    """Folder of the build and of the bundles, which may be deleted."""
    table: Path
    """The table that autotune updates."""
    seconds: float
    """Time to measure each row of a bundle."""
    patience: float = 1.0
    """Factor of the stages' limits."""


def stages(plan: Plan) -> list[Stage]:
    """Return all stages in their order: the most valuable results first."""
    python, sanitizer = sys.executable, shutil.which("compute-sanitizer")
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    sizes = [word for size in plan.sizes for word in ("--size", size)]
    nvcc = find_nvcc()
    build = _build(plan, nvcc)
    compilers = None if nvcc else "nvcc was not found: install the CUDA toolkit or set CUDACXX, or use a library that has the kernels"
    found = [
        Stage("build", build, 150, unavailable=compilers),
        Stage("tests", ([*tests, "tests/gpu", "tests/ops"],), 120, expects=" passed"),
    ]
    for size in plan.sizes:
        bundle = plan.work / f"{size}.scm"
        row = [python, "-m", "scm_runtime", "bench", str(bundle), "--device", "cuda", "--dtype", "fp16", "--native-ops"]
        row += ["--batch-sizes", "1,8", "--steps", "1,2"]
        found += [
            Stage(f"bundle {size}", ([python, str(BENCHMARKS / "_first_gpu" / "random_bundle.py"), size, str(bundle)],), 150),
            Stage(f"row {size}", ([*row, "--seconds", str(plan.seconds), "-o", str(plan.results / f"bench-{size}.json")],), 120, needs=(f"bundle {size}",)),
        ]
    tuned = Stage("autotune", ([python, str(BENCHMARKS / "autotune.py"), *sizes, "--seconds", "90", "--table", str(plan.table)],), 120)
    rows = [stage for stage in found if stage.name == f"row {plan.sizes[-1]}"]
    again = [
        Stage(f"{row.name}, tuned", _into(row.commands, "bench-", "bench-tuned-"), row.limit_s, needs=(*row.needs, "autotune", "build again")) for row in rows
    ]
    operators = [python, str(BENCHMARKS / "ops.py"), "--device", "cuda", "--only", "operators"]
    found = [
        *found,
        tuned,
        Stage("build again", build, 90, needs=("autotune",), unavailable=compilers),
        *again,
        Stage("calls", ([python, str(BENCHMARKS / "cuda_calls.py"), "--repeats", "30"],), 90),
        Stage("operators", (operators,), 60, unavailable=None if torch.version.cuda else "this PyTorch was built without CUDA"),
        Stage(
            "sanitizer",
            ([sanitizer or "", "--error-exitcode", "1", *tests, "tests/ops"],),
            120,
            expects=" passed",
            unavailable=None if sanitizer else "compute-sanitizer was not found",
        ),
    ]
    return [replace(stage, limit_s=stage.limit_s * plan.patience) for stage in found]


def find_nvcc() -> str | None:
    """Return the path of nvcc, or None: the one that CUDACXX names, else that in PATH, else that in CUDA's usual folder."""
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    return shutil.which("nvcc") or shutil.which("nvcc", path=CUDA_FOLDER)


def _build(plan: Plan, nvcc: str | None) -> tuple[Command, ...]:
    """Return the commands that build the native library for this GPU alone, put it where this Python finds it, and check that it does."""
    folder = str(plan.work / "ops")
    cmake, ninja = shutil.which("cmake") or "cmake", shutil.which("ninja")
    configure = [cmake, "-S", str(ROOT / "cpp_ops"), "-B", folder, "-DCMAKE_BUILD_TYPE=Release", "-DSCM_OPS_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    configure += [f"-DSCM_OPS_CUDA_ARCHITECTURES={plan.capability}-real", *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else [])]
    packages = sysconfig.get_path("platlib")
    check = [sys.executable, str(BENCHMARKS / "_first_gpu" / "installed.py"), packages]
    return configure, [cmake, "--build", folder, "--parallel"], [cmake, "--install", folder, "--prefix", packages], check


def _into(commands: Sequence[Command], old: str, new: str) -> tuple[Command, ...]:
    """Return the commands with another prefix of the result's file name."""
    return tuple([str(Path(word).with_name(Path(word).name.replace(old, new, 1))) if word.endswith(".json") else word for word in one] for one in commands)
