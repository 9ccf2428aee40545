"""EDM2's cosine attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scm_export.ops.magnitude import pixel_norm


def cosine_attention(qkv: Tensor, heads: int, eps: float = 1e-4) -> Tensor:
    """Self-attention whose queries, keys and values are normalised per head (EDM2, arXiv 2312.02696, configuration G and its appendix).

    Args:
        qkv: ``[N, L, 3 C]``; the channels are laid out ``[heads, C / heads, 3]``, as in EDM2's checkpoints.
        heads: number of heads; divides C.
        eps: of the normalisation.

    Returns:
        ``[N, L, C]``.
    """
    n, length, channels = qkv.shape
    head_size = channels // (3 * heads)
    qkv = qkv.reshape(n, length, heads, head_size, 3).permute(4, 0, 2, 1, 3)  # [3, N, heads, L, d]
    q, k, v = pixel_norm(qkv, eps).unbind(0)
    weights = torch.softmax((q * (1 / math.sqrt(head_size))) @ k.transpose(-1, -2), dim=-1)
    return (weights @ v).transpose(1, 2).reshape(n, length, heads * head_size)
