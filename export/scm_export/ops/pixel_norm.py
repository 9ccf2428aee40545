"""``PixelNorm``: every pixel's channel vector at unit root mean square (EDM2, arXiv 2312.02696, equation 30)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scm_export.ops.mp_silu import mp_silu
from scm_export.ops.operator import Operator, emits_nodes


def pixel_norm(x: Tensor, eps: float = 1e-4) -> Tensor:
    """``x / (eps + |x| / sqrt(C))``.

    Args:
        x: ``[..., C]``, any floating dtype.
        eps: added to the norm, which is computed in float32.
    """
    if emits_nodes():
        return PIXEL_NORM.node(x, eps=eps)[0]
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return x / (eps + norm * (1 / math.sqrt(x.shape[-1]))).to(x.dtype)


def pixel_norm_silu(x: Tensor, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Return ``y = pixel_norm(x)`` and ``mp_silu(y)``."""
    if emits_nodes():
        y, activated = PIXEL_NORM.node(x, outputs=2, eps=eps)
        return y, activated
    y = pixel_norm(x, eps)
    return y, mp_silu(y)


def pixel_norm_statements(x: str, y: str) -> str:
    """Statements for ``y = pixel_norm(x)`` in ONNX's textual syntax, with the attribute eps."""
    # Not ReduceL2: the graph would have to compute the number of channels. Not Mul (x, x): ONNX Runtime uses different layouts for the two x.
    return f"""
        {y}_axis = Constant <value_ints = [-1]> ()
        {y}_wide = Cast <to = 1> ({x})
        {y}_two = Constant <value_float = 2.0> ()
        {y}_square = Pow ({y}_wide, {y}_two)
        {y}_mean = ReduceMean <keepdims = 1> ({y}_square, {y}_axis)
        {y}_rms = Sqrt ({y}_mean)
        {y}_eps = Constant <value_float: float = @eps> ()
        {y}_sum = Add ({y}_rms, {y}_eps)
        {y}_divisor = CastLike ({y}_sum, {x})
        {y} = Div ({x}, {y}_divisor)
    """


PIXEL_NORM = Operator(
    name="PixelNorm",
    inputs={"x": "T"},
    attributes=("eps",),
    output="y",
    output_type="T",
    activated=True,
    body=pixel_norm_statements("x", "y"),
)
