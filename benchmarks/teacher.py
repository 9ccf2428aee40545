"""How much faster is the student than its diffusion teacher? One and two steps against 63 evaluations, on the same machine, in the same runtime.

    python benchmarks/teacher.py                 digits and XXS
    python benchmarks/teacher.py S XXL           0.5 and 4 minutes per sample of the teacher; XXL takes 18 GB of memory

The student is an EDM2 network with sCM's changes, the teacher an EDM2 network of the same size. The weights are random, except for digits, whose student's
weights serve as the teacher's too. Both are bundles in scm_runtime and run in turn, from seeds to pixels or latents, at batch 1. The teacher's sampler is
DPM-Solver-2S in 32 steps: 63 evaluations. With guidance it would evaluate two networks and take twice as long. Rows that are not measured stay in the
results.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec
import torch
from _common import AGAIN, Cells
from _peers.models import DIGITS, edm2_config, random_checkpoint
from _peers.sizes import BASE_BYTES, SIZES, available_bytes, memory_shortage, preparing_bytes

from export import in_a_process
from scm_export import export
from scm_export.checkpoints import Checkpoint, SamplerSpec, load_checkpoint, save_checkpoint
from scm_export.networks.edm2 import PRESETS, UNet
from scm_runtime import Generator

SAMPLER, STEPS = "dpm-solver-2s", 32
EVALUATIONS = 2 * STEPS - 1
KNOWN, USUAL = ("digits", "XXS", "S", "XXL"), ("digits", "XXS")
SECONDS = 12.0  # duration of the rounds; at least one round


def write_student(size: str, folder: Path) -> Path:
    return DIGITS if size == "digits" else random_checkpoint(edm2_config(size), folder / "student.pt")


def write_teacher(size: str, folder: Path) -> Path:
    """Write a diffusion model of the same size."""
    path = folder / "teacher.pt"
    if size == "digits":
        student = load_checkpoint(DIGITS)
        save_checkpoint(msgspec.structs.replace(student, sampler=msgspec.structs.replace(student.sampler, solver="ddim", times=None)), path)
        return path
    torch.manual_seed(0)
    config = replace(PRESETS[size], img_resolution=edm2_config(size).img_resolution)
    network = UNet(config)
    torch.nn.init.ones_(network.out_gain)
    sampler = SamplerSpec(parametrisation="edm", solver="ddim")
    save_checkpoint(Checkpoint(family="edm2", config=asdict(config), sampler=sampler, weights=network.state_dict()), path)
    return path


def make_bundle(write: Callable[[str, Path], Path], size: str, folder: Path, name: str) -> Path:
    """Write a checkpoint and export it. Runs in a separate process."""
    checkpoint = write(size, folder)
    bundle = export(checkpoint, folder / f"{name}.scm", verify=False, steps=()).path
    if checkpoint.parent == folder:
        checkpoint.unlink()
    return bundle


def measure(student: Generator, teacher: Generator, seconds: float) -> dict[str, Any]:
    """Return the milliseconds of one sample by number of evaluations, and the speed-ups."""
    samplers: dict[str, Callable[[], Any]] = {
        "1 step": partial(student, 3, seed=0, num_inference_steps=1, output_type="np"),
        "2 steps": partial(student, 3, seed=0, num_inference_steps=2, output_type="np"),
        f"{EVALUATIONS} evaluations": partial(teacher, 3, seed=0, num_inference_steps=STEPS, sampler=SAMPLER, output_type="np"),
    }
    one_evaluation = partial(teacher, 3, seed=0, timesteps=teacher.manifest.times["8"][:1], output_type="np")
    warm_up = samplers | {f"{EVALUATIONS} evaluations": one_evaluation}
    for draw in warm_up.values():
        draw()
    times: dict[str, list[float]] = {name: [] for name in samplers}
    end = time.perf_counter() + seconds
    while not times["1 step"] or time.perf_counter() < end:
        for name, draw in samplers.items():
            warm_up[name]()
            start = time.perf_counter()
            drawn = draw()
            times[name].append((time.perf_counter() - start) * 1e3)
            evaluations = EVALUATIONS if name.endswith("evaluations") else int(name.split()[0])
            if len(drawn.timings.steps) != evaluations:
                raise SystemExit(f"{name} took {len(drawn.timings.steps)} evaluations")
    medians = {name: statistics.median(values) for name, values in times.items()}
    whole = medians[f"{EVALUATIONS} evaluations"]
    return {
        "median_ms": medians,
        "min_ms": {name: min(values) for name, values in times.items()},
        "rounds": len(times["1 step"]),
        "times_as_fast": {name: whole / medians[name] for name in ("1 step", "2 steps")},
    }


def row(size: str) -> dict[str, Any]:
    """Return the figures of one size, or the reason why there are none."""
    title, weights = SIZES[size].title, SIZES[size].weights_bytes
    need = max(preparing_bytes(SIZES[size]), 2.4 * weights + BASE_BYTES)
    if reason := memory_shortage(need, f"the teacher and the student of {title}", available_bytes()):
        return {"title": title, "status": "skipped", "reason": reason}
    with tempfile.TemporaryDirectory(prefix="teacher-") as temporary:
        bundles = [in_a_process(make_bundle, write, size, Path(temporary), name) for name, write in (("student", write_student), ("teacher", write_teacher))]
        with Generator(bundles[0], verify_integrity=False) as student, Generator(bundles[1], verify_integrity=False) as teacher:
            found = measure(student, teacher, SECONDS)
            native = student.info.native_ops
    return {"title": title, "status": "ok", "date": datetime.now(UTC).date().isoformat(), "native_ops": native, "sampler": SAMPLER, **found}


@click.command(help=__doc__.split("\n")[0])
@click.argument("sizes", nargs=-1, type=click.Choice(KNOWN))
@AGAIN
def main(sizes: tuple[str, ...], again: bool) -> None:
    cells = Cells("teacher", again=again)
    for size in sizes or USUAL:
        cells.measure(size, by=partial(row, size))


if __name__ == "__main__":
    main()
