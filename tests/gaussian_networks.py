"""Exact networks for Gaussian data N(mean, std^2) in five parametrizations: factories for the family ``module``.

Each is derived independently from the formulas of its paper, not from another network or from the code under test.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MEAN, STD, SIGMA_DATA = 0.3, 0.2, 0.5


class Gaussian(nn.Module):
    """A network whose weights are the data's mean and standard deviation.

    With ``diffusion`` it returns the posterior mean, otherwise the end point of the probability-flow ODE, as a perfect consistency model does.
    """

    def __init__(self, diffusion: bool = False) -> None:
        super().__init__()
        self.diffusion = diffusion
        self.mean, self.std = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))

    def denoised(self, x: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Denoise ``x = signal * data + noise * normal``."""
        scale = torch.sqrt(signal**2 * self.std**2 + noise**2)
        score = (x - signal * self.mean) / scale
        return self.mean + self.std * score * (signal * self.std / scale if self.diffusion else 1.0)


class TrigFlow(Gaussian):
    """F(x / sigma_d, t), the velocity dx/dt divided by sigma_d."""

    sign = 1

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        cos, sin = (wave.reshape(-1, 1, 1, 1) for wave in (t.cos(), t.sin()))
        data = self.denoised(x * SIGMA_DATA, cos, sin * SIGMA_DATA)
        return self.sign * (cos * x - data / SIGMA_DATA) / sin


class NegatedTrigFlow(TrigFlow):
    sign = -1


class Edm(Gaussian):
    """F(c_in x, c_noise) with D = c_skip x + c_out F (arXiv 2206.00364, table 1)."""

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        sigma = torch.exp(4 * c_noise).reshape(-1, 1, 1, 1)
        size = torch.sqrt(sigma**2 + SIGMA_DATA**2)
        x = x * size
        c_skip, c_out = (SIGMA_DATA / size) ** 2, sigma * SIGMA_DATA / size
        return (self.denoised(x, torch.ones_like(sigma), sigma) - c_skip * x) / c_out


class Flow(Gaussian):
    """The velocity ``noise - data`` of ``(1 - u) data + u noise``, with data and noise divided by sigma_d."""

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        u = u.reshape(-1, 1, 1, 1)
        return (x - self.denoised(x * SIGMA_DATA, 1 - u, u * SIGMA_DATA) / SIGMA_DATA) / u


class X0(Gaussian):
    """Predicts the data."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.denoised(x, *(wave.reshape(-1, 1, 1, 1) for wave in (t.cos(), t.sin() * SIGMA_DATA)))


NETWORKS: dict[str, type[Gaussian]] = {"trigflow": TrigFlow, "trigflow-negated": NegatedTrigFlow, "edm": Edm, "flow": Flow, "x0": X0}


def make(parametrisation: str, diffusion: bool = False) -> nn.Module:
    """Return a network; the factory ``gaussian_networks:make``."""
    return NETWORKS[parametrisation](diffusion)
