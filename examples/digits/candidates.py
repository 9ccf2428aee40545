"""The samplers that are evaluated: teacher and students, each in plain PyTorch and through bundles in fp32 and fp16, with the same weights and noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from data import to_pixels
from samplers import T_MAX, TWO_STEPS, Network, Noise, autoguided, bundle_noise, dpm_solver_2s, sample_consistency
from scm_export import export
from scm_export.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from scm_runtime import Generator
from scm_runtime.bundle.manifest import Dtype
from train import as_checkpoint, new_network

CPU = torch.device("cpu")
CHUNK = 250  #            samples per call
SOLVER_STEPS = 32  #      63 evaluations
GUIDANCE = 2.5
DTYPES: tuple[Dtype, ...] = ("fp32", "fp16")
TEACHER, GUIDED = "teacher, 63 evaluations", "teacher with autoguidance, 63 evaluations"
UNDISTILLED = "teacher, not distilled, 2 steps"

Draw = Callable[[Tensor, Tensor], Tensor]
"""Maps int64 labels and seeds ``[N]`` to pixel levels ``[N, 1, 28, 28]``, whole numbers in float32."""


@dataclass(frozen=True)
class Candidate:
    """One row of the table."""

    name: str
    through: str
    """What runs the sampler: "PyTorch", or the dtype of a bundle."""
    checkpoint_sha256: str
    weights_sha256: str
    """SHA-256 of the checkpoint followed by the guide, if there is one."""
    draw: Draw


def find_candidates(folder: Path, student: Path) -> list[Candidate]:
    """Return the rows for which there are checkpoints.

    Those are the student of sCD; the teacher if the training folder has ``teacher.state.pt``; sCT if it has ``digits-sct.pt``.

    Args:
        folder: the training folder. Bundles and the teacher's checkpoints are written to its subfolder ``bundles``.
        student: the checkpoint of sCD.
    """
    work = folder / "bundles"
    work.mkdir(parents=True, exist_ok=True)
    found: list[Candidate] = []
    if (folder / "teacher.state.pt").exists() and (folder / "teacher.snapshot.pt").exists():
        found += _teachers(folder, work)
    sct = folder / "digits-sct.pt"
    for method, path in (("sCD", student), ("sCT", sct)):
        if path.exists() or method == "sCD":  # a missing sCD checkpoint is an error of load_checkpoint
            found += _students(method, path, work)
    return found


def _teachers(folder: Path, work: Path) -> Iterator[Candidate]:
    state = torch.load(folder / "teacher.state.pt", weights_only=True)["ema"]
    good = _write_diffusion(state, work / "teacher.pt")
    bad = _write_diffusion(torch.load(folder / "teacher.snapshot.pt", weights_only=True), work / "guide.pt")
    teacher = _network(good)
    solve = partial(dpm_solver_2s, steps=SOLVER_STEPS)
    options = {"num_inference_steps": SOLVER_STEPS, "sampler": "dpm-solver-2s"}
    yield from _rows(TEACHER, good, None, work, lambda labels, noise: solve(teacher, labels, noise=noise), options)
    guided = autoguided(teacher, _network(bad), GUIDANCE)
    yield from _rows(GUIDED, good, bad, work, lambda labels, noise: solve(guided, labels, noise=noise), {**options, "guidance_scale": GUIDANCE})
    (row, *_) = _rows(UNDISTILLED, good, None, work, lambda labels, noise: sample_consistency(teacher, labels, TWO_STEPS, noise), {})
    yield row  # only in PyTorch: a bundle of a diffusion model has no consistency sampling


def _students(method: str, path: Path, work: Path) -> Iterator[Candidate]:
    network, times = _network(path), load_checkpoint(path).sampler.times or {}
    for steps, usual in ((2, TWO_STEPS), (1, (T_MAX,))):
        at = times[str(steps)][:-1] if str(steps) in times else usual
        name = f"{method}, {steps} step{'s' * (steps > 1)}"
        yield from _rows(name, path, None, work, partial(_consistency, network, at), {"num_inference_steps": steps})


def _consistency(network: Network, times: Sequence[float], labels: Tensor, noise: Noise) -> Tensor:
    return sample_consistency(network, labels, times, noise)


def _rows(name: str, path: Path, guide: Path | None, work: Path, sample: Callable[[Tensor, Noise], Tensor], options: dict[str, Any]) -> Iterator[Candidate]:
    """Yield the rows of one sampler: in PyTorch and through a bundle of each dtype."""

    def in_pytorch(labels: Tensor, seeds: Tensor) -> Tensor:
        return to_pixels(torch.cat([sample(*chunk) for chunk in ((x, bundle_noise(s)) for x, s in _chunks(labels, seeds))]))

    files = path.read_bytes(), guide.read_bytes() if guide else b""
    row = Candidate(name, "PyTorch", hashlib.sha256(files[0]).hexdigest(), hashlib.sha256(b"".join(files)).hexdigest(), in_pytorch)
    yield row
    for dtype in DTYPES:
        yield replace(row, through=dtype, draw=partial(_through_bundle, path, guide, dtype, work, options))


def _through_bundle(path: Path, guide: Path | None, dtype: Dtype, work: Path, options: dict[str, Any], labels: Tensor, seeds: Tensor) -> Tensor:
    with Generator(_bundle(path, guide, dtype, work)) as generate:
        drawn = [generate(x.numpy(), seed=s.tolist(), output_type="np", **options).array for x, s in _chunks(labels, seeds)]
    return torch.cat([torch.from_numpy(array) for array in drawn]).permute(0, 3, 1, 2).float()


@cache
def _bundle(path: Path, guide: Path | None, dtype: Dtype, work: Path) -> Path:
    name = f"{path.stem}{'-guided' * (guide is not None)}-{dtype}.scm"
    return export(path, work / name, dtype=dtype, guide=guide, force=True, verify=False).path


def _chunks(labels: Tensor, seeds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(labels.split(CHUNK), seeds.split(CHUNK), strict=True)


def _network(path: Path) -> Network:
    """Return the network in float32, with the half-precision weights of the checkpoint, which the bundles have too."""
    checkpoint: Checkpoint = load_checkpoint(path)
    network = new_network(CPU, {name: tensor.float() for name, tensor in checkpoint.weights.items()})
    network.compute_dtype = torch.float32
    return network.eval()


def _write_diffusion(weights: dict[str, Tensor], path: Path) -> Path:
    checkpoint = as_checkpoint(new_network(CPU, weights))
    save_checkpoint(msgspec.structs.replace(checkpoint, sampler=msgspec.structs.replace(checkpoint.sampler, solver="ddim")), path)
    return path
