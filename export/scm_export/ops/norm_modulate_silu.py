"""``NormModulateSiLU``: sCM's adaptive double normalization (arXiv 2410.11081, section 4.1)."""

from __future__ import annotations

from torch import Tensor

from scm_export.ops.modulate_silu import per_pixel
from scm_export.ops.mp_silu import mp_silu
from scm_export.ops.operator import Operator, emits_nodes, silu_statements
from scm_export.ops.pixel_norm import pixel_norm, pixel_norm_statements


def norm_modulate_silu(y: Tensor, modulation: Tensor, eps: float = 1e-4) -> Tensor:
    """``mp_silu(pixel_norm(y) * pixel_norm(s) + pixel_norm(b))`` with ``[s, b] = modulation``.

    Args:
        y: ``[N, ..., C]``.
        modulation: ``[N, 2 C]``, with the dtype of ``y``.
        eps: epsilon of the normalizations.
    """
    if emits_nodes():
        return NORM_MODULATE_SILU.node(y, modulation, eps=eps)[0]
    scale, shift = (per_pixel(pixel_norm(half, eps), y) for half in modulation.chunk(2, dim=-1))
    return mp_silu(pixel_norm(y, eps) * scale + shift)


NORM_MODULATE_SILU = Operator(
    name="NormModulateSiLU",
    inputs={"y": "T", "modulation": "T"},
    attributes=("eps",),
    output="z",
    output_type="T",
    body=f"""
        scale, shift = Split <axis = -1, num_outputs = 2> (modulation)
        {pixel_norm_statements("scale", "scale_norm")}
        {pixel_norm_statements("shift", "shift_norm")}
        {pixel_norm_statements("y", "y_norm")}
        axes = Constant <value_ints: ints = {{inner_axes}}> ()
        scale_per_pixel = Unsqueeze (scale_norm, axes)
        shift_per_pixel = Unsqueeze (shift_norm, axes)
        scaled = Mul (y_norm, scale_per_pixel)
        shifted = Add (scaled, shift_per_pixel)
        {silu_statements("shifted", "z")}
    """,
)
