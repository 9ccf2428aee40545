"""``ToImage``: converts decoded float images to uint8."""

from __future__ import annotations

import torch
from torch import Tensor

from scm_export.ops.operator import Operator, emits_nodes


def to_image(x: Tensor, scale: float, offset: float) -> Tensor:
    """``round(clamp(x * scale + offset, 0, 255))`` as uint8, channels last. Rounds half to even; NaN gives 0.

    Args:
        x: ``[N, C, H, W]``, any floating dtype.
        scale: uint8 levels per unit of ``x``.
        offset: level of ``x = 0``.

    Returns:
        uint8 ``[N, H, W, C]``.
    """
    if emits_nodes():
        n, channels, height, width = x.shape
        return TO_IMAGE.node(x, shape=(n, height, width, channels), dtype=torch.uint8, scale=scale, offset=offset)[0]
    level = (x.float() * scale + offset).nan_to_num(nan=0.0).clamp(0, 255)
    return level.round().to(torch.uint8).permute(0, 2, 3, 1)


TO_IMAGE = Operator(
    name="ToImage",
    inputs={"x": "T"},
    attributes=("scale", "offset"),
    output="image",
    output_type="uint8",
    body="""
        scale = Constant <value_float: float = @scale> ()
        offset = Constant <value_float: float = @offset> ()
        black = Constant <value_float = 0.0> ()
        white = Constant <value_float = 255.0> ()
        wide = Cast <to = 1> (x)
        scaled = Mul (wide, scale)
        level = Add (scaled, offset)
        undefined = IsNaN (level)
        defined = Where (undefined, black, level)
        clipped = Clip (defined, black, white)
        rounded = Round (clipped)
        planes = Cast <to = 2> (rounded)
        image = Transpose <perm = [0, 2, 3, 1]> (planes)
    """,
)
