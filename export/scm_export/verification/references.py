"""What PyTorch computes in float32 with the weights as they are: the samples, evaluations and pictures that a bundle's graphs are held against."""

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

BATCH_SIZES = (1, 3)  #            a batch of 1 is the last sample of the batch of 3: a sample depends on its own seed and conditioning alone
DYNAMIC_SIZES = (7, 300)  #               sizes of a free dimension
GUIDANCE_FACTORS = (1.0, 1.5)  #           guidance scales, in units of the default
TIME_FRACTIONS = (0.75, 0.5, 0.25)  #     between the end and the start of sampling: where single evaluations are compared
FIRST_SEED = 20241011  #           any will do
EAGER = f"PyTorch {torch.__version__} eager, fp32"

# Beyond these an evaluation takes seconds on a CPU, and the plan is cut: see _plan.
LARGE_NETWORK = 100_000_000  #     parameters
LARGE_IMAGE = 256 * 256  #       pixels

TF32_SETTINGS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv")


@dataclass(frozen=True)
class ConditioningCase:
    """One way of giving a model its conditioning."""

    guidance_scale: float | None
    sizes: dict[str, int]  #  of the free dimensions, by name


@dataclass(frozen=True)
class ReferenceSamples:
    """A batch of samples. A batch size below N in ``batch_sizes``, ``composed`` or of ``pixels`` stands for the last so many samples."""

    way: ConditioningCase
    sampler: str | None  #                       one of the model's; None for its step's own
    steps: int
    batch_sizes: tuple[int, ...]  #              to sample in with the step graph
    composed: tuple[int, ...]  #                 to sample in with sample-K, if the bundle has it
    seeds: NDArray[np.int64]  #                  [N]
    conditioning: dict[str, NDArray[Any]]  #     each [N, ...]
    latents: NDArray[np.float32]  #              [N, *sample], the final state
    pixels: NDArray[Any] | None  #               decoded: uint8 [P, H, W, C], or the latents; P is at most N


@dataclass(frozen=True)
class ReferenceStep:
    """One evaluation of the step for a batch of samples at different times."""

    way: ConditioningCase
    inputs: dict[str, NDArray[Any]]  #  x, t, t_next, noise, and the conditioning
    x_next: NDArray[np.float32]


@dataclass(frozen=True)
class ReferenceMapping:
    """A network between latents and images, on its own."""

    graph: Literal["decode", "preview", "encode"]
    input: str
    given: NDArray[Any]  #     [P, ...]
    expected: NDArray[Any]  #  [P, ...]


@dataclass(frozen=True)
class References:
    """All that is compared."""

    name: str
    sigma_data: float
    level: float | None  #  one level of a pixel in the state's scale; None where a network makes the pixels, or nothing does
    drawn: list[ReferenceSamples]
    evaluated: list[ReferenceStep]
    mapped: list[ReferenceMapping]

    @property
    def finite(self) -> bool:
        """Whether PyTorch's own results are finite."""
        states = [*(one.latents for one in self.drawn), *(one.x_next for one in self.evaluated)]
        return all(bool(np.isfinite(array).all()) for array in (*states, *(one.expected for one in self.mapped)))


def compute_references(model: Model, progress: Callable[[str], None]) -> References:
    """Sample with the original's own sampler where the model has one, with the step in eager PyTorch where not; evaluate and decode in eager PyTorch."""
    reference = model.reference or Reference(EAGER, lambda noises, times, conditioning: sample(model.step, noises, times, model.initial_scale, conditioning))
    model.compute_in("fp32")
    with without_tf32():
        drawn = [_draw(model, reference, planned, progress) for planned in _plan(model)]
        progress("evaluating in PyTorch: single steps")
        evaluated = [_evaluate(model, drawn[0].way)]
        mapped = list(_map(model, drawn, progress))
    level = 1 / abs(model.decoder.scale) if isinstance(model.decoder, ImageDecoder) else None
    return References(reference.name, model.sigma_data, level, drawn, evaluated, mapped)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Within the block torch multiplies float32 matrices in float32, on every device; before it perhaps in TF32, whose mantissa has 10 bits."""
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
# What to compare: everything, or for networks and pictures that take seconds each of everything once.


@dataclass(frozen=True)
class _Planned:
    way: ConditioningCase
    sampler: str | None
    steps: int
    batch_sizes: tuple[int, ...]
    pictures: int  #              to decode, of the last samples
    composed: tuple[int, ...]


def _plan(model: Model) -> Iterator[_Planned]:
    """The ways × step counts up to 4 × batch sizes, and each other sampler once.

    Of a large network up to two steps, the batch of 3 with the largest count, other ways with the smallest.
    """
    large, one, both = model.parameters > LARGE_NETWORK, BATCH_SIZES[:1], BATCH_SIZES
    counts = [count for count in sorted(model.times) if count <= (2 if large else MAX_COMPOSED_STEPS)] or [min(model.times)]
    small_pictures = not _is_large(model.decoder)
    for index, way in enumerate(_conditioning_cases(model)):
        for count in counts if not (large and index) else counts[:1]:
            batch_sizes = one if large and (index or count < counts[-1]) else both
            pictures = max(batch_sizes) if small_pictures else 0 if index else 1
            composed = () if large and index else tuple(n for n in (one if large else both) if n <= pictures)
            yield _Planned(way, None, count, batch_sizes, pictures, composed)
    for name, table in model.samplers.items():
        yield _Planned(_conditioning_cases(model)[0], name, min(table), one if large else both, 0, ())


def _conditioning_cases(model: Model) -> list[ConditioningCase]:
    guidance = next((item for item in model.conditioning if item.name == "guidance_scale"), None)
    free = sorted({size for item in model.conditioning for size in item.shape if isinstance(size, str)})
    ways = [
        ConditioningCase(None if guidance is None else factor * (guidance.default or 1.0), {name: tokens + i for i, name in enumerate(free)})
        for factor, tokens in zip(GUIDANCE_FACTORS, DYNAMIC_SIZES, strict=True)
    ]
    return ways if guidance is not None or free else ways[:1]


def _is_large(part: object) -> bool:
    return isinstance(part, ImageNetwork) and part.shape[0] * part.shape[1] >= LARGE_IMAGE


# ----------------------------------------------------------------------------
# The results.


def _conditioning(model: Model, way: ConditioningCase, n: int) -> dict[str, Tensor]:
    """For the last n samples of the largest batch."""
    total = max(BATCH_SIZES)
    values = {item.name: example_conditioning(item, total, way.sizes) for item in model.conditioning}
    if way.guidance_scale is not None:
        values["guidance_scale"] = torch.full((total,), way.guidance_scale)
    return {name: value[-n:].clone() for name, value in values.items()}


def _seeds(n: int) -> Tensor:
    return torch.arange(FIRST_SEED, FIRST_SEED + max(BATCH_SIZES))[-n:]


def _draw(model: Model, reference: Reference, planned: _Planned, progress: Callable[[str], None]) -> ReferenceSamples:
    n = max(planned.batch_sizes)
    progress(f"sampling in PyTorch: {describe_steps(planned)}, batch {n}{describe(planned.way)}")
    conditioning, seeds = _conditioning(model, planned.way, n), _seeds(n)
    noises = [ops.philox_normal(seeds, draw, model.sample_shape) for draw in range(1 if planned.sampler else planned.steps + 1)]
    with torch.no_grad():
        if planned.sampler is None:
            latents = reference.sample(noises, model.times[planned.steps], conditioning).float()
        else:
            rows = model.samplers[planned.sampler][planned.steps]
            latents = sample_ode(planned.sampler, rows, model.step, noises[0], model.initial_scale, model.sigma_data, conditioning)
        pixels = model.decode(latents[-planned.pictures :]) if planned.pictures else None
    return ReferenceSamples(
        planned.way,
        planned.sampler,
        planned.steps,
        planned.batch_sizes,
        planned.composed,
        seeds.numpy(),
        _arrays(conditioning),
        latents.numpy(),
        None if pixels is None else pixels.numpy(),
    )


@torch.no_grad()
def _evaluate(model: Model, way: ConditioningCase) -> ReferenceStep:
    """From noise of the size that states have at each time, straight to the end."""
    n = len(TIME_FRACTIONS)
    start, end = max(map(max, model.times.values())), min(map(min, model.times.values()))
    t = torch.tensor([_between(start, end, share, model.time_unit) for share in TIME_FRACTIONS])
    size = torch.sqrt(t**2 + model.sigma_data**2) if model.time_unit == "sigma" else torch.full_like(t, model.initial_scale)
    x, noise = (ops.philox_normal(_seeds(n), draw, model.sample_shape) for draw in (0, 1))
    inputs = {"x": x * size.reshape(-1, *(1,) * len(model.sample_shape)), "t": t, "t_next": torch.full_like(t, end), "noise": noise}
    conditioning = _conditioning(model, way, n)
    x_next: Tensor = model.step(*inputs.values(), conditioning)
    return ReferenceStep(way, _arrays({**inputs, **conditioning}), x_next.numpy())


def _between(start: float, end: float, share: float, unit: str) -> float:
    if unit == "sigma":  # evenly in its logarithm, as noise levels are felt
        return math.exp(share * math.log(start) + (1 - share) * math.log(max(end, 1e-3)))
    t = end + share * (start - end)
    return float(round(t)) if unit == "timestep" else t


@torch.no_grad()
def _map(model: Model, drawn: Sequence[ReferenceSamples], progress: Callable[[str], None]) -> Iterator[ReferenceMapping]:
    source = max((one for one in drawn if one.way == drawn[0].way), key=lambda one: len(one.latents))
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


def describe_steps(what: _Planned | ReferenceSamples) -> str:
    """A few words for progress messages."""
    return f"{what.steps} step{'s' * (what.steps != 1)}{f' of {what.sampler}' if what.sampler else ''}"


def describe(way: ConditioningCase) -> str:
    """A few words for progress messages, empty for a model without such conditioning."""
    guidance = "" if way.guidance_scale is None else f", guidance {way.guidance_scale:g}"
    return guidance + "".join(f", {size} {name}" for name, size in way.sizes.items())


def _arrays(tensors: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}
