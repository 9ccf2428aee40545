"""Solvers for the ODE of a diffusion model as their papers write them, in EDM's variables: the reference for the tables of ``samplers.py``."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from scm_export.samplers import karras_sigmas
from scm_runtime.bundle.solver_tables import SolverStages

Denoise = Callable[[Tensor, float], Tensor]
"""(EDM's state ``X = x / cos t``, sigma) to the denoised sample D."""


@torch.no_grad()
def sample_ode(
    solver: str, rows: SolverStages, step: torch.nn.Module, noise: Tensor, initial_scale: float, sigma_data: float, conditioning: dict[str, Tensor]
) -> Tensor:
    """Solve the ODE from the first row's time to 0 in eager PyTorch, with states in float64.

    Args:
        solver: name in ``samplers.SOLVERS``.
        rows: the solver's table; only the number of steps and the time of the first row are read.
        step: the model's step.
        noise: standard normal, ``[N, *sample]``.
        initial_scale: factor of the noise in the first state.
        sigma_data: of the model.
        conditioning: of the step, each ``[N, ...]``.

    Returns:
        The final state, float32 ``[N, *sample]``.
    """
    steps = sum(row.weights is None for row in rows)
    sigmas = karras_sigmas(steps, sigma_max=sigma_data * math.tan(rows[0].t))
    zero = torch.zeros(len(noise), device=noise.device)

    def denoise(X: Tensor, sigma: float) -> Tensor:
        t = math.atan(sigma / sigma_data)
        D: Tensor = step((X * math.cos(t)).float(), torch.full_like(zero, t), zero, torch.zeros_like(noise), conditioning)
        return D.double()

    X = noise.double() * initial_scale / math.cos(rows[0].t)
    for sigma, sigma_next in pairwise(sigmas):
        X = denoise(X, sigma) if sigma_next == 0 else STEPS[solver](denoise, X, sigma, sigma_next)
    return X.float()


def _heun(denoise: Denoise, X: Tensor, sigma: float, sigma_next: float) -> Tensor:
    slope = (X - denoise(X, sigma)) / sigma
    X_next = X + (sigma_next - sigma) * slope
    return X + (sigma_next - sigma) * (slope + (X_next - denoise(X_next, sigma_next)) / sigma_next) / 2


def _dpm_solver_2s(denoise: Denoise, X: Tensor, sigma: float, sigma_next: float) -> Tensor:
    log_snr, h = -math.log(sigma), math.log(sigma / sigma_next)
    sigma_middle = math.exp(-(log_snr + h / 2))
    noise = (X - denoise(X, sigma)) / sigma
    X_middle = X - sigma_middle * math.expm1(h / 2) * noise
    return X - sigma_next * math.expm1(h) * (X_middle - denoise(X_middle, sigma_middle)) / sigma_middle


def _dpm_solver_pp_2s(denoise: Denoise, X: Tensor, sigma: float, sigma_next: float) -> Tensor:
    log_snr, h = -math.log(sigma), math.log(sigma / sigma_next)
    sigma_middle = math.exp(-(log_snr + h / 2))
    X_middle = sigma_middle / sigma * X - math.expm1(-h / 2) * denoise(X, sigma)
    return sigma_next / sigma * X - math.expm1(-h) * denoise(X_middle, sigma_middle)


STEPS: dict[str, Callable[[Denoise, Tensor, float, float], Tensor]] = {
    "dpm-solver-2s": _dpm_solver_2s,
    "dpm-solver++-2s": _dpm_solver_pp_2s,
    "heun": _heun,
}
