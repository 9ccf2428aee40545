"""Parametrisations: conversion of what a network predicts to TrigFlow's F, one function per parametrisation, and the sampler's step.

TrigFlow (sCM, arXiv 2410.11081, section 3): ``x_t = cos t x0 + sin t z`` with z ~ N(0, sigma_d^2) and t in [0, pi/2]. A network
trained in another parametrisation is converted to TrigFlow's F, with the denoised sample ``f(x, t) = cos t x - sin t sigma_d F``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from scm_export.choices import ParametrisationName
from scm_export.ops import consistency_step
from scm_export.samplers import SIGMA_MAX

INTERMEDIATE_TIME = 1.1  # second time of two-step sampling, for every data set (sCM, appendix on sampling)

Solver = Literal["consistency", "ddim"]
Network = Callable[[Tensor, Tensor], Tensor]
"""A network with its conditioning bound: maps (input ``[N, ...]``, noise level ``[N]``) to an output of the input's shape."""


def t_max(sigma_data: float) -> float:
    """The time of pure noise in TrigFlow, ``arctan(80 / sigma_d)``, radians."""
    return math.atan(SIGMA_MAX / sigma_data)


def default_times(sigma_data: float) -> dict[int, tuple[float, ...]]:
    """The paper's times for one and two steps, with the end time 0."""
    return {1: (t_max(sigma_data), 0.0), 2: (t_max(sigma_data), INTERMEDIATE_TIME, 0.0)}


# ----------------------------------------------------------------------------
# (network, x, t, sigma_d) -> F, for x at TrigFlow's time t.


def trigflow(network: Network, x: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """``F = network(x / sigma_d, t)`` (sCM, equation 5)."""
    return network(x / sigma_data, t)


def trigflow_negated(network: Network, x: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """``F = -network(x / sigma_d, t)``: for networks trained with the opposite sign."""
    return -network(x / sigma_data, t)


def edm(network: Network, x: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """``F = -F_edm(c_in x_sigma, ln(sigma) / 4)`` with ``sigma = sigma_d tan t`` (EDM, arXiv 2206.00364, table 1).

    EDM's state is ``x_sigma = x / cos t``. Therefore its scaled input ``c_in x_sigma = x_sigma / sqrt(sigma^2 + sigma_d^2)`` is ``x / sigma_d``.
    """
    sin, cos = t.double().sin(), t.double().cos()
    return -network(x / sigma_data, (torch.log(sigma_data * sin / cos) / 4).float())


def flow(network: Network, x: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """Flow matching's velocity, noise minus data of unit scale, at ``u = sin t / (cos t + sin t)`` of the path ``(1 - u) data + u noise``.

    The path's state is ``h = x / sigma_d / (cos t + sin t)``, and the denoised ``h - u v`` gives
    ``F = ((1 - 2u) h + (1 - 2u + 2u^2) v) / sqrt(u^2 + (1 - u)^2)`` (SANA-Sprint, arXiv 2503.09641, section 3.1).
    """
    sin, cos = t.double().sin(), t.double().cos()
    u = sin / (cos + sin)
    size = torch.sqrt(u**2 + (1 - u) ** 2)
    h = x * _per_sample(size / sigma_data, x)
    v = network(h, u.float())
    return _per_sample((1 - 2 * u) / size, x) * h + _per_sample((1 - 2 * u + 2 * u**2) / size, x) * v


def x0(network: Network, x: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """``F = (cos t x - D) / (sin t sigma_d)`` for a network that predicts the denoised sample in the scale of the data: ``D = network(x, t)``."""
    sin, cos = t.double().sin(), t.double().cos()
    return (_per_sample(cos, x) * x - network(x, t)) / _per_sample(sin * sigma_data, x)


PARAMETRISATIONS: dict[ParametrisationName, Callable[[Network, Tensor, Tensor, float], Tensor]] = {
    "trigflow": trigflow,
    "trigflow-negated": trigflow_negated,
    "edm": edm,
    "flow": flow,
    "x0": x0,
}


# ----------------------------------------------------------------------------
# One step, and the sampler.


class Step(nn.Module):
    """One step of a TrigFlow sampler, the module that is traced: ``(x, t, t_next, noise, conditioning) -> x_next``.

    x, noise and x_next are float32 ``[N, *sample]``, t and t_next float32 ``[N]``. The conditioning is a dict of the network's keyword arguments, each
    ``[N, ...]``.
    """

    def __init__(
        self,
        network: nn.Module,
        sigma_data: float,
        parametrisation: ParametrisationName = "trigflow",
        solver: Solver = "consistency",
        *,
        segments: bool = False,
    ) -> None:
        """Make the step of a network.

        Args:
            network: called as ``network(x, level, **conditioning)``.
            sigma_data: standard deviation of the data.
            parametrisation: what the network predicts.
            solver: "consistency" jumps to the data and adds noise again; "ddim" follows the ODE to ``t_next`` and ignores the noise.
            segments: also pass the end of the segment to the network, as ``t_end = t_next``.
        """
        super().__init__()
        self.network, self.sigma_data, self.parametrisation, self.solver, self.segments = network, sigma_data, parametrisation, solver, segments

    def forward(self, x: Tensor, t: Tensor, t_next: Tensor, noise: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        end = {"t_end": t_next} if self.segments else {}

        def network(x: Tensor, level: Tensor) -> Tensor:
            F: Tensor = self.network(x, level, **conditioning, **end)
            return F

        F = PARAMETRISATIONS[self.parametrisation](network, x, t, self.sigma_data)
        if self.solver == "ddim":
            return ddim_step(x, F, t, t_next, self.sigma_data)
        return consistency_step(x, F, noise, t, t_next, self.sigma_data)


def ddim_step(x: Tensor, F: Tensor, t: Tensor, t_next: Tensor, sigma_data: float) -> Tensor:
    """``cos(t - t') x - sin(t - t') sigma_d F``: the first-order step of the ODE (sCM, section 3), also the jump inside a segment."""
    angle = t.double() - t_next.double()
    return _per_sample(angle.cos(), x) * x - _per_sample(angle.sin() * sigma_data, x) * F


@torch.no_grad()
def sample(step: nn.Module, noises: Sequence[Tensor], times: tuple[float, ...], initial_scale: float, conditioning: dict[str, Tensor]) -> Tensor:
    """Sample in eager PyTorch, for reference.

    Args:
        step: see :class:`Step`.
        noises: draws 0, 1, … of standard normal noise, each float32 ``[N, *sample]``.
        times: of the steps, the end time last.
        initial_scale: factor of the noise in the first state.
        conditioning: of the step.

    Returns:
        The final state, float32 ``[N, *sample]``.
    """
    x = noises[0] * initial_scale
    for k, (t, t_next) in enumerate(pairwise(times)):
        start, end = (torch.full((len(x),), value, device=x.device) for value in (t, t_next))
        x = step(x, start, end, noises[k + 1], conditioning)
    return x


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Reshape float64 values ``[N]`` for multiplication with x. They are computed in float64 since a float32 sine depends on a sample's place in the batch."""
    return values.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
