"""Does the bundle compute what the checkpoint computes? The PyTorch sampler in float32 against the bundle's graphs, through the runtime itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scm_export import ops
from scm_export.model import ImageDecoder, Model, Reference
from scm_export.parametrisation import sample
from scm_export.tolerances import sample_atol
from scm_export.trace import example
from scm_runtime.bundle import Manifest, Verification, VerifiedCase
from scm_runtime.errors import InferenceError, VerificationError
from scm_runtime.generator import Generator
from scm_runtime.session import Session

BATCH_SIZES = (1, 3)
EAGER = f"PyTorch {torch.__version__} eager, fp32"
FIRST_SEED = 20241011  # any will do


@dataclass(frozen=True)
class Drawn:
    """What PyTorch draws for one batch size and step count."""

    batch_size: int
    steps: int
    seeds: list[int]
    conditioning: dict[str, NDArray[Any]]
    latents: NDArray[np.float32]
    pixels: NDArray[np.uint8]
    level: float  #  one level of a pixel, in the state's scale; of a decoder's pixels, 1


def draw_references(model: Model, steps: Sequence[int], progress: Callable[[str], None]) -> list[Drawn]:
    """Sample with the model in PyTorch, in float32, for every batch size and step count to be verified."""
    references = []
    reference = model.reference or Reference(EAGER, lambda noises, times, conditioning: sample(model.step, noises, times, model.initial_scale, conditioning))
    model.compute_in("fp32")
    for batch_size in BATCH_SIZES:
        seeds = torch.arange(FIRST_SEED, FIRST_SEED + batch_size)
        conditioning = {item.name: example(item, batch_size) for item in model.conditioning}
        for count in steps:
            progress(f"sampling in PyTorch: batch {batch_size}, {count} steps")
            noises = [ops.philox_normal(seeds, draw, model.sample_shape) for draw in range(count + 1)]
            latents = reference.sample(noises, model.times[count], conditioning)
            pixels = model.decode(latents)
            level = 1 / abs(model.decoder.scale) if isinstance(model.decoder, ImageDecoder) else 1.0
            arrays = {name: values.numpy() for name, values in conditioning.items()}
            references.append(Drawn(batch_size, count, seeds.tolist(), arrays, latents.numpy(), pixels.numpy(), level))
    return references


def verify_bundle(folder: Path, manifest: Manifest, references: Sequence[Drawn], atol: float | None, progress: Callable[[str], None]) -> Verification:
    """Draw the references' samples through the bundle's graphs and compare.

    Returns:
        All cases with how far off they were, within tolerance.

    Raises:
        VerificationError: a case is over its tolerance or not finite, or ONNX Runtime refuses a graph.
    """
    if not all(np.isfinite(reference.latents).all() for reference in references):
        raise VerificationError("the PyTorch sampler itself gives values that are not finite: are these the trained weights?")
    try:
        cases = sorted(_compare(folder, manifest, references, atol, progress), key=lambda case: (case.dtype, case.graph != "step", case.graph))
    except InferenceError as error:
        raise VerificationError(f"the bundle does not run: {error}") from error
    report = Verification(reference=EAGER, device="cpu", cases=tuple(cases))
    if bad := [case for case in cases if not case.max_abs <= case.atol]:
        worst = max(bad, key=lambda case: case.max_abs if math.isfinite(case.max_abs) else math.inf)
        raise VerificationError(
            f"{len(bad)} of {len(cases)} cases are over tolerance; the worst is {worst.graph}.{worst.dtype} at batch {worst.batch_size}, "
            f"{worst.steps} steps: max abs error {worst.max_abs:.3g}, tolerance {worst.atol:.3g}. "
            "No bundle was written. --atol sets another tolerance, --no-verify leaves the check out.",
            report,
        )
    return report


def _compare(folder: Path, manifest: Manifest, references: Sequence[Drawn], atol: float | None, progress: Callable[[str], None]) -> Iterator[VerifiedCase]:
    for dtype in manifest.dtypes:
        tolerance = sample_atol(dtype, manifest.weights_dtype, manifest.sigma_data) if atol is None else atol
        # Largest first: what the allocator keeps of a session that is done, the next one can use.
        for count in sorted(manifest.composed_steps, reverse=True):
            yield from _compare_composed(folder, manifest, dtype, count, [one for one in references if one.steps == count], tolerance, progress)
        # Without the native library: what is verified is what the bundle itself holds.
        with Generator(folder, dtype=dtype, native_ops=False, verify_integrity=False) as generate:
            for reference in references:
                progress(f"verifying the {dtype} graphs: batch {reference.batch_size}, {reference.steps} steps")
                states: list[NDArray[np.float32]] = []
                samples = generate(
                    **reference.conditioning,  # type: ignore[arg-type]  # keywords by name
                    seed=reference.seeds,
                    num_inference_steps=reference.steps,
                    output_type="np",
                    callback_on_step_end=partial(_keep_state, states),
                )
                yield _case("step", dtype, reference, _max_abs(states[-1], reference.latents), tolerance, samples.array)


def _compare_composed(
    folder: Path,
    manifest: Manifest,
    dtype: str,
    count: int,
    references: Sequence[Drawn],
    tolerance: float,
    progress: Callable[[str], None],
) -> Iterator[VerifiedCase]:
    session = Session(folder / f"sample-{count}.{dtype}.onnx")  # a function of its own: one session's weights are in memory at a time
    for reference in references:
        progress(f"verifying sample-{count}.{dtype}: batch {reference.batch_size}")
        inputs = {item.name: reference.conditioning[item.name] for item in manifest.conditioning}
        pixels = session(seeds=np.array(reference.seeds, np.int64), **inputs)
        # A whole sampler returns pixels alone: their difference, in the state's scale, where rounding adds up to a level.
        error = _max_abs(pixels, reference.pixels) * reference.level
        yield _case(f"sample-{count}", dtype, reference, error, tolerance + reference.level, pixels)


def _keep_state(states: list[NDArray[np.float32]], _generator: Generator, _step: int, _t: float, values: dict[str, NDArray[np.float32]]) -> None:
    states.append(values["latents"])


def _max_abs(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


def _case(graph: str, dtype: str, reference: Drawn, error: float, atol: float, pixels: NDArray[np.uint8]) -> VerifiedCase:
    mse = float(np.square(pixels.astype(np.float64) - reference.pixels).mean())
    return VerifiedCase(
        graph=graph,
        dtype=dtype,
        batch_size=reference.batch_size,
        steps=reference.steps,
        max_abs=error,
        atol=atol,
        psnr=None if mse == 0 else 10 * math.log10(255**2 / mse),
    )
