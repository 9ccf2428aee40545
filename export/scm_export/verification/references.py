"""Reference results: what PyTorch computes in float32 with the weights before rounding. The bundle's graphs are compared with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scm_export import ops
from scm_export.choices import MAX_COMPOSED_STEPS
from scm_export.example_inputs import example_conditioning
from scm_export.model import ImageDecoder, ImageNetwork, Model, Reference
from scm_export.parametrisation import sample
from scm_export.verification.ode_reference import sample_ode
from scm_export.verification.text import ReferenceText, compute_text

BATCH_SIZES = (1, 3)  #                  a batch of 1 is the last sample of the batch of 3: samples depend on their own seed and conditioning only
DYNAMIC_SIZES = (7, 300)  #              sizes of dynamic dimensions, one per conditioning case
GUIDANCE_FACTORS = (1.0, 1.5)  #         guidance scales relative to the default, one per conditioning case
TIME_FRACTIONS = (0.75, 0.5, 0.25)  #    between the end and the start of sampling: times of the single steps
FIRST_SEED = 20241011  #                 arbitrary
EAGER = f"PyTorch {torch.__version__} eager, fp32"

# Above these sizes an evaluation takes seconds on a CPU, and fewer samples are compared: see _plan.
LARGE_NETWORK = 100_000_000  #           parameters
LARGE_IMAGE = 256 * 256  #               pixels

TF32_SETTINGS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv")


@dataclass(frozen=True)
class ConditioningCase:
    """Guidance scale and sizes of one variant of a model's conditioning."""

    guidance_scale: float | None
    sizes: dict[str, int]  #  of the dynamic dimensions, by name


@dataclass(frozen=True)
class ReferenceSamples:
    """A batch of N samples. Smaller batches, in ``batch_sizes``, ``composed_batch_sizes`` and ``pixels``, use its last samples."""

    case: ConditioningCase
    sampler: str | None  #                         one of the model's samplers; None for the step's own
    steps: int
    batch_sizes: tuple[int, ...]  #                to sample with the step graph
    composed_batch_sizes: tuple[int, ...]  #       to sample with sample-K, if the bundle has it
    seeds: NDArray[np.int64]  #                    [N]
    conditioning: dict[str, NDArray[Any]]  #       each [N, ...]
    latents: NDArray[np.float32]  #                [N, *sample], the final state
    pixels: NDArray[Any] | None  #                 decoded: uint8 [P, H, W, C], or the latents; P is at most N


@dataclass(frozen=True)
class ReferenceStep:
    """One evaluation of the step for a batch of samples at different times."""

    case: ConditioningCase
    inputs: dict[str, NDArray[Any]]  #  x, t, t_next, noise, and the conditioning
    x_next: NDArray[np.float32]


@dataclass(frozen=True)
class ReferenceMapping:
    """Input and output of a network between latents and images."""

    graph: Literal["decode", "preview", "encode"]
    input_name: str
    inputs: NDArray[Any]  #    [P, ...]
    expected: NDArray[Any]  #  [P, ...]


@dataclass(frozen=True)
class References:
    """All reference results of one model."""

    name: str  #                what computed the samples, for the report
    sigma_data: float
    level: float | None  #      one level of a pixel in the scale of the state; None if a network makes the pixels, or if there are no pixels
    samples: list[ReferenceSamples]
    single_steps: list[ReferenceStep]
    mappings: list[ReferenceMapping]
    text: ReferenceText | None = None

    @property
    def finite(self) -> bool:
        """True if PyTorch's results contain no NaN and no infinity."""
        states = [*(one.latents for one in self.samples), *(one.x_next for one in self.single_steps)]
        return all(
            bool(np.isfinite(array).all()) for array in (*states, *(one.expected for one in self.mappings), *(() if self.text is None else self.text.outputs))
        )


def compute_references(model: Model, progress: Callable[[str], None]) -> References:
    """Compute a model's reference results.

    Samples come from the original's own sampler if the model has one, otherwise from the step in eager PyTorch. Single steps and decoded images always come
    from eager PyTorch. ``progress`` is called with the name of each stage.
    """
    reference = model.reference or Reference(EAGER, lambda noises, times, conditioning: sample(model.step, noises, times, model.initial_scale, conditioning))
    model.compute_in("fp32")
    with without_tf32():
        samples = [_compute_samples(model, reference, planned, progress) for planned in _plan(model)]
        progress("evaluating in PyTorch: single steps")
        single_steps = [_compute_step(model, samples[0].case)]
        mappings = list(_compute_mappings(model, samples, progress))
        text = None if model.text is None else compute_text(model.text, progress)
    level = 1 / abs(model.decoder.scale) if isinstance(model.decoder, ImageDecoder) else None
    return References(reference.name, model.sigma_data, level, samples, single_steps, mappings, text)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Context in which torch multiplies float32 matrices in full precision on every device. TF32, which it may otherwise use, has a 10-bit mantissa."""
    settings = [attrgetter(name)(torch.backends) for name in TF32_SETTINGS]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


# ----------------------------------------------------------------------------
# What to compare: every combination, or a selection for networks and images that take seconds each.


@dataclass(frozen=True)
class _PlannedSamples:
    case: ConditioningCase
    sampler: str | None
    steps: int
    batch_sizes: tuple[int, ...]
    decoded: int  #                               number of samples to decode, counted from the last
    composed_batch_sizes: tuple[int, ...]


def _plan(model: Model) -> Iterator[_PlannedSamples]:
    """All conditioning cases, step counts up to 4 and batch sizes, and each additional sampler once.

    For a large network: at most two steps, the batch of 3 only with the largest count, further conditioning cases only with the smallest.
    """
    large, one, both = model.parameters > LARGE_NETWORK, BATCH_SIZES[:1], BATCH_SIZES
    counts = [count for count in sorted(model.times) if count <= (2 if large else MAX_COMPOSED_STEPS)] or [min(model.times)]
    small_images = not _is_large(model.decoder)
    cases = _conditioning_cases(model)
    for index, case in enumerate(cases):
        for count in counts if not (large and index) else counts[:1]:
            batch_sizes = one if large and (index or count < counts[-1]) else both
            decoded = max(batch_sizes) if small_images else 0 if index else 1
            composed = () if large and index else tuple(n for n in (one if large else both) if n <= decoded)
            yield _PlannedSamples(case, None, count, batch_sizes, decoded, composed)
    for name, table in model.samplers.items():
        yield _PlannedSamples(cases[0], name, min(table), one if large else both, 0, ())


def _conditioning_cases(model: Model) -> list[ConditioningCase]:
    guidance = next((item for item in model.conditioning if item.name == "guidance_scale"), None)
    dynamic = sorted({size for item in model.conditioning for size in item.shape if isinstance(size, str)})
    cases = [
        ConditioningCase(None if guidance is None else factor * (guidance.default or 1.0), {name: size + i for i, name in enumerate(dynamic)})
        for factor, size in zip(GUIDANCE_FACTORS, DYNAMIC_SIZES, strict=True)
    ]
    return cases if guidance is not None or dynamic else cases[:1]


def _is_large(part: object) -> bool:
    return isinstance(part, ImageNetwork) and part.shape[0] * part.shape[1] >= LARGE_IMAGE


# ----------------------------------------------------------------------------
# Results.


def _conditioning(model: Model, case: ConditioningCase, n: int) -> dict[str, Tensor]:
    """Conditioning of the last n samples of the largest batch."""
    total = max(BATCH_SIZES)
    values = {item.name: example_conditioning(item, total, case.sizes) for item in model.conditioning}
    if case.guidance_scale is not None:
        values["guidance_scale"] = torch.full((total,), case.guidance_scale)
    return {name: value[-n:].clone() for name, value in values.items()}


def _seeds(n: int) -> Tensor:
    return torch.arange(FIRST_SEED, FIRST_SEED + max(BATCH_SIZES))[-n:]


def _compute_samples(model: Model, reference: Reference, planned: _PlannedSamples, progress: Callable[[str], None]) -> ReferenceSamples:
    n = max(planned.batch_sizes)
    progress(f"sampling in PyTorch: {describe_steps(planned)}, batch {n}{describe_case(planned.case)}")
    conditioning, seeds = _conditioning(model, planned.case, n), _seeds(n)
    noises = [ops.philox_normal(seeds, draw, model.sample_shape) for draw in range(1 if planned.sampler else planned.steps + 1)]
    with torch.no_grad():
        if planned.sampler is None:
            latents = reference.sample(noises, model.times[planned.steps], conditioning).float()
        else:
            rows = model.samplers[planned.sampler][planned.steps]
            latents = sample_ode(planned.sampler, rows, model.step, noises[0], model.initial_scale, model.sigma_data, conditioning)
        pixels = model.decode(latents[-planned.decoded :]) if planned.decoded else None
    return ReferenceSamples(
        case=planned.case,
        sampler=planned.sampler,
        steps=planned.steps,
        batch_sizes=planned.batch_sizes,
        composed_batch_sizes=planned.composed_batch_sizes,
        seeds=seeds.numpy(),
        conditioning=_arrays(conditioning),
        latents=latents.numpy(),
        pixels=None if pixels is None else pixels.numpy(),
    )


@torch.no_grad()
def _compute_step(model: Model, case: ConditioningCase) -> ReferenceStep:
    """One step from each of the TIME_FRACTIONS straight to the end, from noise as large as the states at these times."""
    n = len(TIME_FRACTIONS)
    start, end = max(map(max, model.times.values())), min(map(min, model.times.values()))
    t = torch.tensor([_time_between(start, end, fraction, model.time_unit) for fraction in TIME_FRACTIONS])
    scale = torch.sqrt(t**2 + model.sigma_data**2) if model.time_unit == "sigma" else torch.full_like(t, model.initial_scale)
    x, noise = (ops.philox_normal(_seeds(n), draw, model.sample_shape) for draw in (0, 1))
    inputs = {"x": x * scale.reshape(-1, *(1,) * len(model.sample_shape)), "t": t, "t_next": torch.full_like(t, end), "noise": noise}
    conditioning = _conditioning(model, case, n)
    x_next: Tensor = model.step(*inputs.values(), conditioning)
    return ReferenceStep(case, _arrays({**inputs, **conditioning}), x_next.numpy())


def _time_between(start: float, end: float, fraction: float, unit: str) -> float:
    if unit == "sigma":  # interpolated in log sigma
        return math.exp(fraction * math.log(start) + (1 - fraction) * math.log(max(end, 1e-3)))
    t = end + fraction * (start - end)
    return float(round(t)) if unit == "timestep" else t


@torch.no_grad()
def _compute_mappings(model: Model, samples: Sequence[ReferenceSamples], progress: Callable[[str], None]) -> Iterator[ReferenceMapping]:
    source = max((one for one in samples if one.case == samples[0].case), key=lambda one: len(one.latents))
    if isinstance(model.decoder, ImageNetwork):
        assert source.pixels is not None
        yield ReferenceMapping("decode", "x", source.latents[-len(source.pixels) :], source.pixels)
    if model.preview is not None:
        latents = source.latents[-1:] if _is_large(model.preview) else source.latents
        progress("decoding a preview in PyTorch")
        yield ReferenceMapping("preview", "x", latents, model.preview.network(torch.from_numpy(latents)).numpy())
    if model.encoder is not None:
        progress("encoding in PyTorch")
        n = 1 if _is_large(model.encoder) else max(BATCH_SIZES)
        image = torch.randint(256, (n, *model.encoder.shape), generator=torch.Generator().manual_seed(FIRST_SEED), dtype=torch.uint8)
        yield ReferenceMapping("encode", "image", image.numpy(), model.encoder.network(image).numpy())


def describe_steps(samples: _PlannedSamples | ReferenceSamples) -> str:
    """Steps and sampler for messages: "2 steps", "8 steps of heun"."""
    return f"{samples.steps} step{'s' * (samples.steps != 1)}{f' of {samples.sampler}' if samples.sampler else ''}"


def describe_case(case: ConditioningCase) -> str:
    """Conditioning case for messages, such as ", guidance 4.5, 7 tokens"; empty for a model without guidance and dynamic dimensions."""
    guidance = "" if case.guidance_scale is None else f", guidance {case.guidance_scale:g}"
    return guidance + "".join(f", {size} {name}" for name, size in case.sizes.items())


def _arrays(tensors: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}
