"""From a decoded float image to pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def to_image(x: Tensor, scale: float, offset: float) -> Tensor:
    """``round(clamp(x * scale + offset, 0, 255))`` as uint8, channels last; rounds to nearest even.

    Args:
        x: ``[N, C, H, W]``, float.
        scale: uint8 levels per unit of ``x``.
        offset: level of ``x = 0``.

    Returns:
        uint8 ``[N, H, W, C]``.
    """
    return (x * scale + offset).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
