"""Magnitude-preserving functions of EDM2 (arXiv 2312.02696): the output has unit magnitude when the inputs have."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def pixel_norm(x: Tensor, eps: float = 1e-4) -> Tensor:
    """Scale each pixel's channel vector to unit root mean square: ``x / (eps + |x| / sqrt(C))`` (EDM2, equation 30).

    Args:
        x: ``[..., C]``, any floating dtype.
        eps: added to the norm, which is taken in float32.
    """
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return x / (eps + norm * (1 / math.sqrt(x.shape[-1]))).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU divided by 0.596, its root mean square on N(0, 1) (EDM2, equation 81). Any shape."""
    return functional.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float, clip: float | None = None) -> Tensor:
    """Blend two tensors of one shape: ``((1-t) a + t b) / sqrt((1-t)^2 + t^2)`` (EDM2, equation 88).

    Args:
        a: any shape.
        b: the same shape.
        t: weight of ``b``, in [0, 1].
        clip: bound on the magnitude of the result; None for none.
    """
    scale = 1 / math.hypot(1 - t, t)
    y = a * ((1 - t) * scale) + b * (t * scale)
    return y if clip is None else y.clamp(-clip, clip)


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Concatenate over channels so that ``a`` and ``b`` contribute in the ratio ``1-t : t`` whatever their widths (EDM2, equation 103).

    Args:
        a: ``[..., Ca]``.
        b: ``[..., Cb]``.
        t: share of ``b`` in the magnitude of the result, in [0, 1].

    Returns:
        ``[..., Ca + Cb]``.
    """
    channels_a, channels_b = a.shape[-1], b.shape[-1]
    scale = math.sqrt((channels_a + channels_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(channels_a)), b * (scale * t / math.sqrt(channels_b))], dim=-1)


def modulate_silu(y: Tensor, scale: Tensor) -> Tensor:
    """EDM2's modulation by an embedding: ``mp_silu(y * scale)``.

    Args:
        y: ``[N, H, W, C]``.
        scale: ``[N, C]``.
    """
    return mp_silu(y * scale[:, None, None, :].to(y.dtype))


def norm_modulate_silu(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """sCM's adaptive double normalisation (arXiv 2410.11081, section 4.1): ``mp_silu(pixel_norm(y) * scale + shift)``.

    The second normalisation, that of ``scale`` and ``shift`` themselves, is the caller's: both come out of ``pixel_norm``.

    Args:
        y: ``[N, H, W, C]``.
        scale: ``[N, C]``.
        shift: ``[N, C]``.
    """
    return mp_silu(pixel_norm(y) * scale[:, None, None, :].to(y.dtype) + shift[:, None, None, :].to(y.dtype))
