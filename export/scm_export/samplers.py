"""Solvers for the ODE of a diffusion model, as the tables of evaluations that the runtime executes: see ``scm_runtime.bundle.solver_tables``.

In EDM's variables, the state ``X = x / cos t`` at ``sigma = sigma_d tan t`` and the denoised D, the ODE is ``dX/dsigma = (X - D) / sigma``. In every
solver here the next state is a weighted sum of X at the start of the step, X where the network was evaluated, and D there. Converted to TrigFlow's x, these
are the weights of a row. The step graph computes D as the step to time 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec

from scm_runtime.bundle.solver_tables import SolverStage, SolverStages

TEACHER_STEPS = (8, 16, 32)
SOLVER_STEPS = (8, 16, 32, 64)
RHO = 7.0
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # EDM's; sigma_max is the largest noise that the models are trained on

Weights = tuple[float, float, float]


def karras_sigmas(steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO) -> tuple[float, ...]:
    """EDM's noise levels for at least 2 steps, the last 0 (arXiv 2206.00364, equation 5)."""
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (*((first + i / (steps - 1) * (last - first)) ** rho for i in range(steps)), 0.0)


def angles(sigmas: Sequence[float], sigma_data: float) -> tuple[float, ...]:
    """``t = arctan(sigma / sigma_d)``."""
    return tuple(math.atan(sigma / sigma_data) for sigma in sigmas)


def teacher_times(sigma_data: float) -> dict[int, tuple[float, ...]]:
    """Times for DDIM: EDM's noise levels for 8, 16 and 32 steps."""
    return {steps: angles(karras_sigmas(steps), sigma_data) for steps in TEACHER_STEPS}


# ----------------------------------------------------------------------------
# (sigma, next sigma) -> the noise level of the second evaluation, and the weights of the first X, the second X and the second D.


def heun(sigma: float, sigma_next: float) -> tuple[float, Weights]:
    """EDM's sampler (arXiv 2206.00364, algorithm 1): the trapezoidal rule, with D evaluated at the end of a first-order step.

    The slope at the start is ``(X_next - X) / (sigma_next - sigma)`` of that step.
    """
    half = (sigma_next - sigma) / 2
    return sigma_next, (0.5, 0.5 + half / sigma_next, -half / sigma_next)


def dpm_solver_2s(sigma: float, sigma_next: float) -> tuple[float, Weights]:
    """DPM-Solver-2 (arXiv 2206.00927, algorithm 1): a step along the noise predicted half-way in log sigma."""
    middle = math.sqrt(sigma * sigma_next)
    slope = (sigma_next - sigma) / middle
    return middle, (1.0, slope, -slope)


def dpm_solver_pp_2s(sigma: float, sigma_next: float) -> tuple[float, Weights]:
    """DPM-Solver++(2S) (arXiv 2211.01095, algorithm 1): a step towards the data predicted half-way in log sigma."""
    ratio = sigma_next / sigma
    return math.sqrt(sigma * sigma_next), (ratio, 0.0, 1 - ratio)


SOLVERS: dict[str, Callable[[float, float], tuple[float, Weights]]] = {
    "dpm-solver-2s": dpm_solver_2s,
    "dpm-solver++-2s": dpm_solver_pp_2s,
    "heun": heun,
}


def solve(solver: Callable[[float, float], tuple[float, Weights]], sigmas: Sequence[float], sigma_data: float) -> SolverStages:
    """Stages of a solver for noise levels that end with 0: two per step, and one for the last step."""

    def cos(sigma: float) -> float:
        return sigma_data / math.hypot(sigma, sigma_data)

    rows = []
    for sigma, sigma_next in pairwise(sigmas):
        if sigma_next == 0:
            rows.append(SolverStage(math.atan(sigma / sigma_data), 0.0))
            continue
        sigma_second, (base, x, denoised) = solver(sigma, sigma_next)
        t, t_second = angles((sigma, sigma_second), sigma_data)
        end = cos(sigma_next)
        rows += [SolverStage(t, t_second), SolverStage(t_second, 0.0, (base * end / cos(sigma), x * end / cos(sigma_second), denoised * end))]
    return tuple(rows)


def make_tables(sigma_data: float, t_start: float) -> dict[str, dict[int, SolverStages]]:
    """Tables of all solvers by name and number of steps, for EDM's noise levels, starting no higher than the noise level at ``t_start``."""
    largest = min(SIGMA_MAX, sigma_data * math.tan(t_start)) if t_start < math.pi / 2 else SIGMA_MAX
    return {name: {steps: solve(solver, karras_sigmas(steps, sigma_max=largest), sigma_data) for steps in SOLVER_STEPS} for name, solver in SOLVERS.items()}


def to_json(tables: dict[str, dict[int, SolverStages]]) -> bytes:
    """Encode tables as ``samplers.json``."""
    return msgspec.json.encode({name: {str(steps): rows for steps, rows in table.items()} for name, table in tables.items()})
