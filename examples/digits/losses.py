"""The losses of the stages: diffusion (teacher), regression on trajectories, consistency, and the last two combined (students)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from data import SIGMA_DATA
from samplers import T_MAX, Network, per_sample
from scm_export.networks.edm2 import PositionalEmbedding, UNet
from trajectories import Trajectories


def noise_levels(n: int, mean: float, std: float, device: torch.device) -> Tensor:
    """Sample times from the proposal distribution: ln sigma ~ N(mean, std^2), t = arctan(sigma / sigma_d), at most t_max."""
    sigma = (torch.randn(n, device=device) * std + mean).exp()
    return torch.atan(sigma / SIGMA_DATA).clamp(max=T_MAX)


class Diffusion:
    """The teacher's loss: F predicts the velocity, |sigma_d F(x_t / sigma_d, t) - (cos t z - sin t x_0)|^2."""

    def __init__(self, net: UNet) -> None:
        self.net = net

    def parameters(self) -> list[nn.Parameter]:
        return list(self.net.parameters())

    def loss(self, x0: Tensor, labels: Tensor, progress: float) -> Tensor:
        del progress
        t = noise_levels(len(x0), 0.0, 1.4, x0.device)
        cos, sin = t.cos()[:, None, None, None], t.sin()[:, None, None, None]
        z = torch.randn_like(x0) * SIGMA_DATA
        F = self.net((cos * x0 + sin * z) / SIGMA_DATA, t, labels)
        error: Tensor = F - (cos * z - sin * x0) / SIGMA_DATA
        return error.square().mean()


class Following:
    """The student's first loss: from any state of a trajectory of the teacher to its end, |F - F'|^2 with F' the F that jumps there."""

    def __init__(self, net: UNet, trajectories: Trajectories, compile: Callable[..., Any], from_start: float = 0.35) -> None:
        self.net, self.trajectories, self.from_start = net, trajectories, from_start
        self.forward = compile(net)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.net.parameters())

    def loss(self, x0: Tensor, labels: Tensor, progress: float) -> Tensor:
        """Return the loss over as many states as there are digits in x0."""
        del labels, progress
        n, (x, t, classes) = len(x0), self.trajectories
        sample = torch.randint(len(x), (n,))
        # Without the last few states, where the target is dominated by the rounding of float16.
        position = torch.where(torch.rand(n) < self.from_start, 0, torch.randint(x.shape[1] - 3, (n,)))
        state, end, time = (value.float().to(x0.device) for value in (x[sample, position], x[sample, -1], t[sample, position]))
        wanted = (per_sample(time.cos()) * state - end) / (per_sample(time.sin()) * SIGMA_DATA)
        error: Tensor = self.forward(state / SIGMA_DATA, time, classes[sample].to(x0.device)) - wanted
        return error.square().mean()


class Consistency:
    """Algorithm 1 of the paper, with tangent normalization, tangent warm-up (over a fraction of the steps, or none) and adaptive weighting.

    Tangents are computed in float32, because their errors limit how good the student becomes.
    """

    def __init__(self, net: UNet, velocity: Network | None, compile: Callable[..., Any], warmup: float = 0.2) -> None:
        self.net, self.velocity, self.warmup = net, velocity, warmup
        device = next(net.parameters()).device
        linear = nn.Linear(64, 1)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.log_weight = nn.Sequential(PositionalEmbedding(64, 4.0), linear).to(device)
        self.jvp, self.forward = compile(self._jvp), compile(net)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.net.parameters(), *self.log_weight.parameters()]

    @torch.no_grad()
    def _jvp(self, x: Tensor, t: Tensor, labels: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """Return F and its directional derivative along (dx, dt)."""
        F, tangent = torch.func.jvp(lambda x, t: self.net(x, t, labels), (x, t), (dx, dt))[:2]
        return F, tangent

    def loss(self, x0: Tensor, labels: Tensor, progress: float) -> Tensor:
        t = noise_levels(len(x0), -0.2, 1.5, x0.device)
        cos, sin = t.cos()[:, None, None, None], t.sin()[:, None, None, None]
        z = torch.randn_like(x0) * SIGMA_DATA
        x = cos * x0 + sin * z
        with torch.no_grad():
            dxdt = cos * z - sin * x0 if self.velocity is None else SIGMA_DATA * self.velocity(x / SIGMA_DATA, t, labels)
            dtype, self.net.compute_dtype = self.net.compute_dtype, torch.float32
            F_frozen, tangent = self.jvp(x / SIGMA_DATA, t, labels, cos * sin * dxdt / SIGMA_DATA, t.cos() * t.sin())
            self.net.compute_dtype = dtype
            r = min(1.0, progress / self.warmup) if self.warmup else 1.0
            g = -(cos**2) * (SIGMA_DATA * F_frozen - dxdt) - r * (cos * sin * x + SIGMA_DATA * tangent)
            # The paper divides by |g| + c. With the root mean square instead, c does not depend on the number of pixels.
            g = g / (g.square().mean((1, 2, 3), keepdim=True).sqrt() + 0.1)
        F = self.forward(x / SIGMA_DATA, t, labels)
        weight: Tensor = self.log_weight(t)[:, 0]
        error: Tensor = (F - F_frozen - g).square().mean((1, 2, 3))
        return (weight.exp() * error - weight).mean()


class Distilling:
    """sCD's loss for a student trained on trajectories: Algorithm 1's combined with Following's, whose target is not the student itself."""

    def __init__(self, following: Following, consistency: Consistency, share: float = 0.4) -> None:
        self.net, self.following, self.consistency, self.share = consistency.net, following, consistency, share

    def parameters(self) -> list[nn.Parameter]:
        return self.consistency.parameters()

    def loss(self, x0: Tensor, labels: Tensor, progress: float) -> Tensor:
        return torch.lerp(self.following.loss(x0, labels, progress), self.consistency.loss(x0, labels, progress), self.share)
