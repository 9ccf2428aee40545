"""Tests whether a network denoises with the parametrization that its config states. The verification of a bundle cannot: it applies the same formulas to both.

The network's own samples serve as data. Noise is added to them and removed again in one step. A trained network removes noise; with formulas that are not its
own it adds some.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scm_export.choices import PARAMETRISATION_NAMES, ParametrisationName
from scm_export.example_inputs import example_conditioning
from scm_export.model import Model
from scm_export.parametrisation import Step

BATCH = 2
TIMES = (0.8, 0.3, 0.15)  # where every network was trained: noise of 1, 0.3 and 0.15 times sigma_data
DECISIVE = 0.3
SCALES = (0.15, 5.0)  # plausible scales of the samples, in units of sigma_data

# Limits for the noise that is left. On trained networks it was at most 1.0 with the right formulas and at least 1.04 with any other ones.
DENOISES, UNCLEAR, ADDS_NOISE = 0.9, 1.02, 1.2


class Outcome(NamedTuple):
    """What a network does with the formulas of one parametrization."""

    scale: float
    """Root mean square of its samples, in units of sigma_data."""
    left: dict[float, float]
    """Noise that is left in one step, as a fraction of the noise added, by time."""

    @property
    def worst(self) -> float:
        """The largest fraction of noise that is left."""
        return max(self.left.values())


def suspicion(model: Model) -> str | None:
    """Return a warning if the parametrization of a model's step is clearly not the network's, or None."""
    assert isinstance(model.step, Step)
    given = _try(model, model.step.parametrisation)
    if given.worst > UNCLEAR:
        others = {name: _try(model, name) for name in PARAMETRISATION_NAMES if name != model.step.parametrisation}
        name, best = min(others.items(), key=lambda item: item[1].worst if _plausible(item[1].scale) else math.inf)
        if _plausible(best.scale) and best.worst < min(DENOISES, 0.85 * given.worst):
            return (
                f"the parametrization is probably not {model.step.parametrisation!r} but {name!r}: of noise added to its own samples, the network leaves up to "
                f"{given.worst:.0%} with the first and {best.worst:.0%} with the second. Compare images of both: --parametrisation {name}"
            )
    if given.left[DECISIVE] > ADDS_NOISE:
        return (
            f"with the parametrization {model.step.parametrisation!r} the network does not denoise: it leaves {given.left[DECISIVE]:.0%} of a little noise "
            "added to its own samples, and no other parametrization fits better. Check the sampler section of the config, and that these are trained weights."
        )
    if not _plausible(given.scale) and (model.solver == "consistency" or given.scale > 1):
        return (
            f"samples have a root mean square of {given.scale * model.sigma_data:.3g}, but sigma_data is {model.sigma_data:g}. "
            "Check sigma_data and the parametrization in the config, and that these are trained weights."
        )
    return None


def _plausible(scale: float) -> bool:
    return SCALES[0] <= scale <= SCALES[1]


@torch.no_grad()
def _try(model: Model, parametrisation: ParametrisationName) -> Outcome:
    assert isinstance(model.step, Step)
    step, sigma_data = Step(model.step.network, model.sigma_data, parametrisation), model.sigma_data
    conditioning = {item.name: example_conditioning(item, BATCH) for item in model.conditioning}
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(BATCH, *model.sample_shape, generator=generator) * sigma_data

    def denoise(x: Tensor, time: float) -> Tensor:
        t = torch.full((BATCH,), time)
        y: Tensor = step(x, t, torch.zeros(BATCH), x, conditioning)
        return y

    start = min(max(map(max, model.times.values())), math.pi / 2 - 1e-3)  # EDM's noise level is infinite at pi/2
    samples = denoise(noise() * math.sin(start), start)
    left = {time: denoise(samples * math.cos(time) + noise() * math.sin(time), time) - samples for time in TIMES}
    size = sigma_data * math.sqrt(samples.numel())
    return Outcome(_number(samples.norm() / size), {time: _number(error.norm() / size / math.sin(time)) for time, error in left.items()})


def _number(value: Tensor) -> float:
    return float(value) if torch.isfinite(value) else math.inf
