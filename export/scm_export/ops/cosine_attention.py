"""``CosineAttention``: self-attention over normalised queries, keys and values (EDM2, arXiv 2312.02696, configuration G and its appendix)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scm_export.ops.operator import Operator, emits_nodes
from scm_export.ops.pixel_norm import pixel_norm, pixel_norm_statements


def cosine_attention(qkv: Tensor, heads: int, eps: float = 1e-4) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v``, with q, k and v pixel-normalised per head of ``d = C / heads`` channels.

    Args:
        qkv: ``[N, L, 3 C]``; the channels have the layout ``[3, heads, C / heads]``.
        heads: number of heads; divides C.
        eps: epsilon of the normalization.

    Returns:
        ``[N, L, C]``.
    """
    n, length, channels = qkv.shape
    if emits_nodes():
        return COSINE_ATTENTION.node(qkv, shape=(n, length, channels // 3), heads=heads, eps=eps)[0]
    head_size = channels // (3 * heads)
    qkv = pixel_norm(qkv.reshape(n, length, 3, heads, head_size), eps)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [N, heads, L, d] each
    weights = torch.softmax((q * (1 / math.sqrt(head_size))) @ k.transpose(-1, -2), dim=-1)
    return (weights @ v).transpose(1, 2).reshape(n, length, heads * head_size)


COSINE_ATTENTION = Operator(
    name="CosineAttention",
    inputs={"qkv": "T"},
    attributes=("heads", "eps"),
    output="y",
    output_type="T",
    sizes={"channels": lambda qkv: qkv[-1] // 3},
    # A 0 in a shape keeps the size of that axis; a -1 would be undefined for an empty batch. The scale is a vector: ONNX Runtime would merge a single
    # number into the product, which rounds differently.
    body=f"""
        three = Constant <value_ints = [3]> ()
        batch_and_length = Constant <value_ints = [0, 0]> ()
        one = Constant <value_ints = [1]> ()
        heads_scalar = Constant <value_int: int = @heads> ()
        heads = Reshape (heads_scalar, one)
        channels_scalar = Constant <value_int: int = @channels> ()
        channels = Reshape (channels_scalar, one)
        head_size = Div (channels, heads)
        split_shape = Concat <axis = 0> (batch_and_length, three, heads, head_size)
        split_qkv = Reshape (qkv, split_shape)
        {pixel_norm_statements("split_qkv", "normed")}
        turned = Transpose <perm = [2, 0, 3, 1, 4]> (normed)
        q, k, v = Split <axis = 0, num_outputs = 3> (turned)
        head_size_float = Cast <to = 1> (head_size)
        root = Sqrt (head_size_float)
        scale = Reciprocal (root)
        scale_T = CastLike (scale, qkv)
        scales = Expand (scale_T, head_size)
        scaled_q = Mul (q, scales)
        k_turned = Transpose <perm = [0, 1, 2, 4, 3]> (k)
        logits = MatMul (scaled_q, k_turned)
        weights = Softmax <axis = -1> (logits)
        by_head = MatMul (weights, v)
        by_pixel = Transpose <perm = [1, 3, 0, 2, 4]> (by_head)
        shape = Concat <axis = 0> (batch_and_length, channels)
        y = Reshape (by_pixel, shape)
    """,
)
