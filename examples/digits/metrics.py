"""What is measured of generated digits beyond recognition: distance, precision and recall in the judge's features, and whether training digits come back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 3  #       whose distance is the radius of a point of a manifold
CLOSE = 0.01  #         quantile of held-out digits' distances below which a sample counts as a copy
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 % quantile of Student's t, by the number of values


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features, ``[Na, D]`` and ``[Nb, D]``."""
    mean_a, mean_b = a.double().mean(0).numpy(), b.double().mean(0).numpy()
    cov_a, cov_b = torch.cov(a.double().T).numpy(), torch.cov(b.double().T).numpy()
    # The trace of the root of a product of covariances is the sum of the roots of its eigenvalues, which rounding may make negative.
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0))
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * roots.sum())


def precision_recall(real: Tensor, drawn: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991, equations 1 and 2).

    Precision is the share of drawn features within the manifold of the real ones, recall the reverse; a manifold is all that lies as near to one of its
    points as that point's k-th nearest neighbour. Features are ``[Nr, D]`` and ``[Nd, D]``.
    """
    return _share_within(drawn, real, neighbours), _share_within(real, drawn, neighbours)


def _share_within(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    radii = torch.cat([torch.cdist(chunk, manifold).kthvalue(neighbours + 1, dim=1).values for chunk in manifold.split(500)])  # the nearest is itself
    return torch.cat([(torch.cdist(chunk, manifold) <= radii).any(1) for chunk in points.split(500)]).float().mean().item()


class Memorised(NamedTuple):
    """How near to the training digits something is, compared with how near digits are that no training has seen."""

    median_ratio: float
    """Of the distances to the nearest training digit: the samples' median over the held-out digits'. Copies would make it small."""
    copies: float
    """Share of samples that are nearer than all but one in a hundred of the held-out digits; 0.01 if samples are as far as those."""


def memorised(drawn: Tensor, training: Tensor, held_out: Tensor) -> Memorised:
    """From levels ``[N, ...]``, by Euclidean distance of pixels."""
    near, far = nearest(drawn, training), nearest(held_out, training)
    return Memorised(float(near.median() / far.median()), (near < far.quantile(CLOSE)).float().mean().item())


def nearest(points: Tensor, others: Tensor) -> Tensor:
    """Distance of each point ``[N, ...]`` to the nearest of the others ``[M, ...]``: ``[N]``."""
    flat = others.flatten(1)
    return torch.cat([torch.cdist(chunk, flat).min(1).values for chunk in points.flatten(1).split(500)])


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % confidence interval by Student's t; NaN for a single value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, T_95[len(values)] * deviation / math.sqrt(len(values))
