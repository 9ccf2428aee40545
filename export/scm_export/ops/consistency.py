"""One step of a TrigFlow consistency sampler."""

from __future__ import annotations

import torch
from torch import Tensor


def consistency_step(x: Tensor, F: Tensor, noise: Tensor, t: Tensor, t_next: Tensor, sigma_data: float) -> Tensor:
    """Jump to the data and noise again: ``cos t' (cos t x - sin t sigma_d F) + sin t' sigma_d noise`` (sCM, arXiv 2410.11081, section 3).

    Args:
        x: ``[N, ...]``, float32: the state at time ``t``.
        F: the network's output, shaped as ``x``.
        noise: standard normal numbers, shaped as ``x``; they do not count where ``t_next`` is 0.
        t: ``[N]``, float32, radians in [0, pi/2].
        t_next: ``[N]``, float32, radians; 0 gives the denoised sample.
        sigma_data: standard deviation of the data.
    """
    per_sample = (-1,) + (1,) * (x.ndim - 1)
    t, t_next = t.reshape(per_sample), t_next.reshape(per_sample)
    denoised = torch.cos(t) * x - torch.sin(t) * sigma_data * F
    return torch.cos(t_next) * denoised + torch.sin(t_next) * sigma_data * noise
