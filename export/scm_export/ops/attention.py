"""EDM2's cosine attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scm_export.ops.magnitude import pixel_norm


def cosine_attention(qkv: Tensor, heads: int, eps: float = 1e-4) -> Tensor:
    """Self-attention whose queries, keys and values are normalised per head (EDM2, arXiv 2312.02696, configuration G and its appendix).

    Args:
        qkv: ``[N, L, 3 C]``; the channels are laid out ``[3, heads, C / heads]``.
        heads: number of heads; divides C.
        eps: of the normalisation.

    Returns:
        ``[N, L, C]``.
    """
    n, length, channels = qkv.shape
    head_size = channels // (3 * heads)
    qkv = pixel_norm(qkv.reshape(n, length, 3, heads, head_size), eps)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [N, heads, L, d] each
    weights = torch.softmax((q * (1 / math.sqrt(head_size))) @ k.transpose(-1, -2), dim=-1)
    return (weights @ v).transpose(1, 2).reshape(n, length, heads * head_size)
