"""``ModulateSiLU``: EDM2's modulation by an embedding (arXiv 2312.02696, figure 21)."""

from __future__ import annotations

from torch import Tensor

from scm_export.ops.mp_silu import mp_silu
from scm_export.ops.operator import Operator, emits_nodes, silu_statements


def modulate_silu(y: Tensor, scale: Tensor) -> Tensor:
    """``mp_silu(y * scale)``.

    Args:
        y: ``[N, ..., C]``.
        scale: ``[N, C]``, with the dtype of ``y``.
    """
    if emits_nodes():
        return MODULATE_SILU.node(y, scale)[0]
    return mp_silu(y * per_pixel(scale, y))


def per_pixel(scale: Tensor, y: Tensor) -> Tensor:
    """Reshape ``[N, C]`` to ``[N, 1, ..., 1, C]``, which broadcasts over y, ``[N, ..., C]``."""
    return scale[(slice(None), *[None] * (y.ndim - 2))]


MODULATE_SILU = Operator(
    name="ModulateSiLU",
    inputs={"y": "T", "scale": "T"},
    output="z",
    output_type="T",
    body=f"""
        axes = Constant <value_ints: ints = {{inner_axes}}> ()
        scale_per_pixel = Unsqueeze (scale, axes)
        scaled = Mul (y, scale_per_pixel)
        {silu_statements("scaled", "z")}
    """,
)
