"""Prepared cases on disk: the models of each size, made once and kept in ``build/peers`` for the next run and for other scripts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from _common import build, machine

from _peers.case import Case
from _peers.client import worker_environment
from _peers.machine import physical_cores
from _peers.sizes import DISK_WEIGHTS, SIZES, available_bytes, memory_shortage, preparing_bytes

FOLDER = Path(__file__).parents[2] / "build" / "peers"
STAGES = ("checkpoint", "bundle", "plain")
USUAL_SAMPLES = 8  # of a small model, so that it is not made again for a larger batch


class NotPreparedError(RuntimeError):
    """The models of a size cannot be prepared on this machine."""


def prepared(size: str, samples: int, steps: int = 2, device: str = "cpu", work: Path = FOLDER, show_progress: Callable[[str], None] = print) -> Case:
    """Return the models of a size for at least that many samples, and make them if ``work`` has none of these sources and packages.

    Raises:
        NotPreparedError: there is too little memory or disk space, or the preparation fails.
    """
    folder = work / f"{size}-{device}-{steps}"
    if SIZES[size].trial:
        samples = max(samples, USUAL_SAMPLES)
    if (folder / "case.json").exists():
        case = Case.load(folder)
        if case.facts.made_with == made_with() and len(case.facts.seeds) >= samples:
            return case
    shutil.rmtree(folder, ignore_errors=True)
    _check_room(size, work)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=work) as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        # A large model is made in one process per stage, so that the memory of a stage is freed before the next one; PyTorch takes seconds to import.
        for stages in [STAGES] if SIZES[size].trial else [(stage,) for stage in STAGES]:
            show_progress(f"  {SIZES[size].title}: making the {', the '.join(stages)}")
            _run_stages(stages, made, size, samples, steps, device)
        shutil.rmtree(folder, ignore_errors=True)  # another script may have made it meanwhile
        made.rename(folder)
    return Case.load(folder)


def made_with() -> str:
    """Return what a prepared case depends on: sources and packages."""
    own = b"".join((Path(__file__).parent / name).read_bytes() for name in ("models.py", "prepare.py"))
    sources = {"sources": build().partition(", ")[2], "prepare": hashlib.sha256(own).hexdigest()[:12]}
    return json.dumps({**sources, **{name: machine().get(name) for name in ("python", "torch", "onnx")}})


def _check_room(size: str, work: Path) -> None:
    """Raise NotPreparedError if memory or disk space do not suffice, before minutes are spent."""
    work.mkdir(parents=True, exist_ok=True)
    if reason := memory_shortage(preparing_bytes(SIZES[size]), f"making {SIZES[size].title}", available_bytes()):
        raise NotPreparedError(reason)
    need, free = DISK_WEIGHTS * SIZES[size].weights_bytes, shutil.disk_usage(work).free
    if need > free:
        raise NotPreparedError(
            f"making {SIZES[size].title} needs about {need / 1e9:.0f} GB of disk, and '{work}' has {free / 1e9:.0f} GB free: name another folder with --work"
        )


def _run_stages(stages: Sequence[str], folder: Path, size: str, samples: int, steps: int, device: str) -> None:
    options = ["--samples", str(samples), "--steps", str(steps), "--device", device, "--made-with", made_with()]
    done = run_python([sys.executable, "-m", "_peers.prepare", ",".join(stages), str(folder), size, *options], folder)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        why = said[-1].strip() if said else f"exit code {done.returncode}"
        raise NotPreparedError(f"making the {', the '.join(stages)} of {SIZES[size].title} failed: {why}")


def measure_peak_rates(device: str, threads: int) -> dict[str, float] | None:
    """Return the peak rates of the machine, or None without PyTorch."""
    program = f"import json; from _peers.machine import peak_rates; print(json.dumps(peak_rates({device!r}, {threads})))"
    with tempfile.TemporaryDirectory() as scratch:
        done = run_python([sys.executable, "-c", program], Path(scratch))
    return None if done.returncode else dict(json.loads(done.stdout))


def run_python(command: Sequence[str], scratch: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with the benchmarks on its path, and with the environment of a worker."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **worker_environment(scratch, physical_cores()), "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
