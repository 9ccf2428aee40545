"""Metrics of generated digits besides classification: Fréchet distance, precision and recall of features, and memorization of training digits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 3  #       k: the radius of a point of a manifold is the distance to its k-th nearest neighbor
CLOSE = 0.01  #         quantile of held-out digits' distances below which a sample counts as a copy
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 % quantile of Student's t, by the number of values


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Fréchet distance between Gaussians fitted to two sets of features, ``[Na, D]`` and ``[Nb, D]``."""
    mean_a, mean_b = a.double().mean(0).numpy(), b.double().mean(0).numpy()
    cov_a, cov_b = torch.cov(a.double().T).numpy(), torch.cov(b.double().T).numpy()
    # The trace of the square root of the product is the sum of the square roots of its eigenvalues, which rounding may make negative.
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0))
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * roots.sum())


def precision_recall(real: Tensor, drawn: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991, equations 1 and 2).

    Precision is the share of generated features within the manifold of the real ones, recall the reverse. A manifold is the union of balls around its
    points, each with the distance to the point's k-th nearest neighbor as its radius. Features are ``[Nr, D]`` and ``[Nd, D]``.
    """
    return _share_within(drawn, real, neighbours), _share_within(real, drawn, neighbours)


def _share_within(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    radii = torch.cat([torch.cdist(chunk, manifold).kthvalue(neighbours + 1, dim=1).values for chunk in manifold.split(500)])  # the nearest is itself
    return torch.cat([(torch.cdist(chunk, manifold) <= radii).any(1) for chunk in points.split(500)]).float().mean().item()


class Memorised(NamedTuple):
    """Distance of samples to the training digits, compared with that of held-out digits."""

    median_ratio: float
    """Median distance to the nearest training digit: that of the samples divided by that of held-out digits. Copies make it small."""
    copies: float
    """Share of samples that are closer than 99 % of the held-out digits; 0.01 if samples are as far away as those."""


def memorised(drawn: Tensor, training: Tensor, held_out: Tensor) -> Memorised:
    """Return the statistics of pixel levels ``[N, ...]``, by Euclidean distance."""
    near, far = nearest(drawn, training), nearest(held_out, training)
    return Memorised(float(near.median() / far.median()), (near < far.quantile(CLOSE)).float().mean().item())


def nearest(points: Tensor, others: Tensor) -> Tensor:
    """Return the distance ``[N]`` of each point ``[N, ...]`` to the nearest of the others ``[M, ...]``."""
    flat = others.flatten(1)
    return torch.cat([torch.cdist(chunk, flat).min(1).values for chunk in points.flatten(1).split(500)])


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % confidence interval by Student's t, which is NaN for a single value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, T_95[len(values)] * deviation / math.sqrt(len(values))
