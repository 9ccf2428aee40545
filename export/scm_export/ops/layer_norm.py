"""Normalizations over the last axis: ``LayerNorm`` (Ba, Kiros and Hinton, arXiv 1607.06450), also with the modulation of DiT, and ``RMSNorm``.

No network calls these functions: :mod:`scm_export.graphs.norms` replaces the normalizations of traced networks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from scm_export.ops.operator import Operator


def layer_norm(x: Tensor, scale: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * scale + bias`` over the last axis.

    Args:
        x: ``[..., C]``, any floating dtype.
        scale: ``[C]``, float32.
        bias: ``[C]``, float32.
        eps: added to the variance.

    Returns:
        A tensor like ``x``. It is computed in float32 and rounded once.
    """
    return functional.layer_norm(x.float(), x.shape[-1:], scale, bias, eps).to(x.dtype)


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * (1 + scale) + shift``: adaLN of DiT (arXiv 2212.09748, section 3.2).

    Args:
        x: ``[N, L, C]``, any floating dtype.
        scale: ``[N, 1, C]``, with the dtype of ``x``.
        shift: ``[N, 1, C]``, with the dtype of ``x``.
        eps: added to the variance.
    """
    return functional.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * (1 + scale) + shift


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * scale`` over the last axis (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: ``[..., C]``, any floating dtype.
        scale: ``[C]``, float32.
        eps: added to the mean.
    """
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * scale).to(x.dtype)


def _channels(x: Sequence[int], *_: object) -> int:
    return x[-1]


LAYER_NORM = Operator(
    name="LayerNorm",
    inputs={"x": "T", "scale": "float", "bias": "float"},
    attributes=("eps",),
    output="y",
    output_type="T",
    body="""
        wide = Cast <to = 1> (x)
        normalized = LayerNormalization <axis = -1, epsilon: float = @eps> (wide, scale, bias)
        y = CastLike (normalized, x)
    """,
)

LAYER_NORM_MODULATE = Operator(
    name="LayerNormModulate",
    inputs={"x": "T", "scale": "T", "shift": "T"},
    attributes=("eps",),
    sizes={"channels": _channels},
    output="y",
    output_type="T",
    body="""
        wide = Cast <to = 1> (x)
        one = Constant <value_float = 1.0> ()
        minus_one = Constant <value_ints = [-1]> ()
        channels_scalar = Constant <value_int: int = @channels> ()
        channels_ = Reshape (channels_scalar, minus_one)
        ones = Expand (one, channels_)
        standard = LayerNormalization <axis = -1, epsilon: float = @eps> (wide, ones)
        normalized = CastLike (standard, x)
        one_T = CastLike (one, x)
        gain = Add (scale, one_T)
        amplified = Mul (normalized, gain)
        y = Add (amplified, shift)
    """,
)

RMS_NORM = Operator(
    name="RMSNorm",
    inputs={"x": "T", "scale": "float"},
    attributes=("eps",),
    output="y",
    output_type="T",
    body="""
        wide = Cast <to = 1> (x)
        square = Mul (wide, wide)
        last = Constant <value_ints = [-1]> ()
        mean = ReduceMean <keepdims = 1> (square, last)
        eps = Constant <value_float: float = @eps> ()
        shifted = Add (mean, eps)
        root = Sqrt (shifted)
        normalized = Div (wide, root)
        scaled = Mul (normalized, scale)
        y = CastLike (scaled, x)
    """,
)
