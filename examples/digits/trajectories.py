"""Trajectories of the guided teacher: states on the way from noise to a digit, and the digit at the end.

A student that was trained on them (Luhman and Luhman, arXiv 2101.02388, here from every state of a trajectory) starts its consistency training near the
goal. The loss has no bias of its own, because its target does not come from the student, and a step costs a quarter.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from data import SIGMA_DATA
from samplers import SHAPE, T_MAX, Network, second_order_step

STEPS = 16  # of DPM-Solver-2, two evaluations each except the last
FROM_NOISE = 0.6  # share that starts at t_max; the others start at a digit plus noise of ln sigma/sigma_d ~ N(0.6, 0.9^2), as a second step does
LEAST_SIGMA = 0.005
CHUNK = 250


class Trajectories(NamedTuple):
    """Trajectories of N samples, with states in float16."""

    x: Tensor
    """``[N, STEPS + 1, 1, 28, 28]``; the last state is the digit, at time 0."""
    t: Tensor
    """``[N, STEPS + 1]``, float32."""
    labels: Tensor
    """``[N]``, int64."""


def draw_trajectories(network: Network, digits: Tensor, labels: Tensor, count: int, device: torch.device) -> Trajectories:
    """Solve the probability-flow ODE from ``count`` starting points. ``digits`` are the training data in the model's scale, ``[M, 1, 28, 28]``."""
    found = Trajectories(torch.empty(count, STEPS + 1, *SHAPE, dtype=torch.float16), torch.empty(count, STEPS + 1), torch.empty(count, dtype=torch.int64))
    for first in track(range(0, count, CHUNK), "trajectories"):
        n = min(CHUNK, count - first)
        index = torch.randint(len(digits), (n,))
        noisy = torch.atan((torch.randn(n) * 0.9 + 0.6).exp()).clamp(0.15, T_MAX)
        start = torch.where(torch.rand(n) < FROM_NOISE, torch.full((n,), T_MAX), noisy)
        t = start[:, None, None, None]
        z = torch.randn(n, *SHAPE) * SIGMA_DATA
        x = torch.where(t == T_MAX, z, t.cos() * digits[index].cpu() + t.sin() * z)
        chosen = labels[index.to(labels.device)].to(device)
        states, times = _solve(network, x.to(device), start.to(device), chosen)
        found.x[first : first + n], found.t[first : first + n], found.labels[first : first + n] = states.half().cpu(), times.cpu(), chosen.cpu()
    return found


@torch.no_grad()
def _solve(network: Network, x: Tensor, start: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return states and times from each sample's start to time 0, along EDM's noise levels."""
    first, share = start.double().tan()[:, None] * SIGMA_DATA, torch.linspace(0, 1, STEPS, dtype=torch.float64, device=x.device)
    levels = (first ** (1 / 7) * (1 - share) + LEAST_SIGMA ** (1 / 7) * share) ** 7
    times = torch.cat([torch.atan(levels / SIGMA_DATA), torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)], dim=1)
    states = [x.double()]
    for t, s in pairwise(times.unbind(1)):
        states.append(second_order_step(network, states[-1], t, s, labels))
    return torch.stack(states, 1).float(), times.float()
