"""Samplers in plain PyTorch, to judge networks while they train."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data import SIGMA_DATA
from scm_export.parametrisation import INTERMEDIATE_TIME, t_max

T_MAX = t_max(SIGMA_DATA)
TWO_STEPS = (T_MAX, INTERMEDIATE_TIME)

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def ddim(network: Network, labels: Tensor, steps: int, seed: int) -> Tensor:
    """Solve the probability-flow ODE from t_max to 0: x_s = cos(t - s) x_t - sin(t - s) sigma_d F. Times evenly spaced in ln sigma."""
    generator = torch.Generator(labels.device).manual_seed(seed)
    x = torch.randn(len(labels), 1, 28, 28, generator=generator, device=labels.device) * SIGMA_DATA
    times = torch.atan(torch.linspace(math.log(80), math.log(0.02), steps).exp() / SIGMA_DATA).tolist()
    for t, s in zip(times, [*times[1:], 0.0], strict=True):
        F = network(x / SIGMA_DATA, torch.full((len(x),), t, device=x.device), labels)
        x = math.cos(t - s) * x - math.sin(t - s) * SIGMA_DATA * F
    return x


@torch.no_grad()
def sample_consistency(network: Network, labels: Tensor, times: Sequence[float], seed: int) -> Tensor:
    """Multistep consistency sampling: jump to the data from each time, with fresh noise in between."""
    generator = torch.Generator(labels.device).manual_seed(seed)
    x = torch.zeros(len(labels), 1, 28, 28, device=labels.device)
    for t in times:
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        x = math.cos(t) * x + math.sin(t) * SIGMA_DATA * noise
        F = network(x / SIGMA_DATA, torch.full((len(x),), t, device=x.device), labels)
        x = math.cos(t) * x - math.sin(t) * SIGMA_DATA * F
    return x


def autoguided(good: Network, bad: Network, weight: float) -> Network:
    """Guide a network by an earlier snapshot of itself (arXiv 2406.02507): F = F_bad + w (F_good - F_bad)."""

    @torch.no_grad()
    def velocity(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        worse = bad(x, t, labels)
        return worse + weight * (good(x, t, labels) - worse)

    return velocity
