"""From what a network predicts to what a sampler needs: one function an equation. TrigFlow (sCM, arXiv 2410.11081, section 3) is the common ground."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from scm_export.ops import consistency_step

SIGMA_MAX = 80.0  #           of EDM; the largest noise the models are trained on
INTERMEDIATE_TIME = 1.1  #    second time of two-step sampling, on every data set (sCM, appendix on sampling)


def t_max(sigma_data: float) -> float:
    """The time of pure noise in TrigFlow, ``arctan(80 / sigma_d)``, radians."""
    return math.atan(SIGMA_MAX / sigma_data)


def default_times(sigma_data: float) -> dict[int, tuple[float, ...]]:
    """The paper's times for one and two steps, each sequence with its end, 0."""
    return {1: (t_max(sigma_data), 0.0), 2: (t_max(sigma_data), INTERMEDIATE_TIME, 0.0)}


class Step(nn.Module):
    """One step of the sampler, the module that is traced: ``(x, t, t_next, noise, conditioning...) -> x_next``.

    Everything is float32 ``[N, *sample]`` but t and t_next, float32 ``[N]``, and the conditioning, ``[N, ...]``.
    """

    def __init__(self, network: nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.network, self.sigma_data = network, sigma_data

    def forward(self, x: Tensor, t: Tensor, t_next: Tensor, noise: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        F = self.network(x / self.sigma_data, t, **conditioning)
        return consistency_step(x, F, noise, t, t_next, self.sigma_data)


@torch.no_grad()
def sample(step: Step, noises: list[Tensor], times: tuple[float, ...], initial_scale: float, conditioning: dict[str, Tensor]) -> Tensor:
    """The sampler in eager PyTorch, for reference: noises are the draws 0, 1, …, float32 ``[N, *sample]``; returns the final state."""
    x = noises[0] * initial_scale
    for k, (t, t_next) in enumerate(pairwise(times)):
        moments = (torch.full((len(x),), value, device=x.device) for value in (t, t_next))
        x = step(x, *moments, noises[k + 1], conditioning)
    return x
