"""Samplers in plain PyTorch, to evaluate networks during training and bundles afterwards. They share only the noise and the times with the exporter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from data import SIGMA_DATA
from scm_export.ops import philox_normal
from scm_export.parametrisation import INTERMEDIATE_TIME, t_max

T_MAX = t_max(SIGMA_DATA)
TWO_STEPS = (T_MAX, INTERMEDIATE_TIME)
SHAPE = (1, 28, 28)

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]
"""Maps the index of a draw to standard normal numbers, ``[N, 1, 28, 28]``."""


def bundle_noise(seeds: Tensor) -> Noise:
    """Return the noise of the runtime for int64 seeds ``[N]``."""
    return lambda draw: philox_normal(seeds, draw, SHAPE)


def torch_noise(n: int, seed: int, device: torch.device) -> Noise:
    """Return noise of PyTorch's generator, which is faster. The draws must be requested in order."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda draw: torch.randn(n, *SHAPE, generator=generator, device=device)


@torch.no_grad()
def ddim(network: Network, labels: Tensor, steps: int, noise: Noise) -> Tensor:
    """Solve the probability-flow ODE from t_max to 0: x_s = cos(t - s) x_t - sin(t - s) sigma_d F. Times evenly spaced in ln sigma."""
    x = noise(0) * SIGMA_DATA
    times = torch.atan(torch.linspace(math.log(80), math.log(0.02), steps).exp() / SIGMA_DATA).tolist()
    for t, s in pairwise([*times, 0.0]):
        F = network(x / SIGMA_DATA, torch.full((len(x),), t, device=x.device), labels)
        x = math.cos(t - s) * x - math.sin(t - s) * SIGMA_DATA * F
    return x


@torch.no_grad()
def dpm_solver_2s(network: Network, labels: Tensor, steps: int, noise: Noise) -> Tensor:
    """DPM-Solver-2 (arXiv 2206.00927, algorithm 1) along EDM's noise levels: two evaluations per step, one for the last.

    32 steps are the usual teacher.
    """
    levels = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps, dtype=torch.float64) ** 7
    times = [*torch.atan(levels / SIGMA_DATA).tolist(), 0.0]
    x = noise(0).double() * SIGMA_DATA
    for t, s in pairwise(times):
        x = second_order_step(network, x, torch.full((len(x),), t, device=x.device).double(), torch.full((len(x),), s, device=x.device).double(), labels)
    return x.float()


def second_order_step(network: Network, x: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
    """A step of DPM-Solver-2 from times t to s, float64 ``[N]``; first-order if s = 0. x is float64, because x - sin t z cancels for t near pi/2.

    With z the noise that F predicts, a first-order step is ``x_s = cos s (x_t - sin t z) / cos t + sin s z``; a second-order step uses z half-way in the
    logarithm of the signal-to-noise ratio, at ``tan m = sqrt(tan t tan s)``.
    """

    def predicted(x: Tensor, t: Tensor) -> Tensor:
        F = network((x / SIGMA_DATA).float(), t.float(), labels)
        return per_sample(t.sin()) * x + per_sample(t.cos()) * SIGMA_DATA * F.double()

    def move(z: Tensor, s: Tensor) -> Tensor:
        return per_sample(s.cos()) * (x - per_sample(t.sin()) * z) / per_sample(t.cos()) + per_sample(s.sin()) * z

    z = predicted(x, t)
    if not s.any():
        return move(z, s)
    middle = torch.atan(torch.sqrt(t.tan() * s.tan()))
    return move(predicted(move(z, middle), middle), s)


def per_sample(values: Tensor) -> Tensor:
    """Reshape ``[N]`` to ``[N, 1, 1, 1]``, to multiply images with."""
    return values[:, None, None, None]


@torch.no_grad()
def sample_consistency(network: Network, labels: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
    """Multistep consistency sampling: jump to the data from each time, and add fresh noise in between."""
    x = noise(0) * SIGMA_DATA
    for draw, t in enumerate(times):
        if draw:
            x = math.cos(t) * x + math.sin(t) * SIGMA_DATA * noise(draw)
        F = network(x / SIGMA_DATA, torch.full((len(x),), t, device=x.device), labels)
        x = math.cos(t) * x - math.sin(t) * SIGMA_DATA * F
    return x


def autoguided(good: Network, bad: Network, weight: float) -> Network:
    """Guide a network with an earlier snapshot of itself (arXiv 2406.02507): F = F_bad + w (F_good - F_bad)."""

    @torch.no_grad()
    def velocity(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        worse = bad(x, t, labels)
        return worse + weight * (good(x, t, labels) - worse)

    return velocity
