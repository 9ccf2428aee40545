"""``ReLULinearAttention``: attention with a ReLU instead of the softmax, linear in the number of tokens (SANA, arXiv 2410.10629, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from scm_export.ops.operator import Operator

MAX_HEAD_SIZE = 256
"""Channels per head that the kernels support."""


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, eps: float = 1e-15) -> Tensor:
    """``relu(q) (relu(k)ᵀ v) / (relu(q) Σ relu(k) + eps)`` for each head; the sum is over the tokens. It is computed in float32.

    This is the reference of the operator. No network calls it: :mod:`scm_export.graphs.transformer_blocks` finds the computation in traced networks.

    Args:
        q: ``[N, L, C]``, any floating dtype; the channels have the layout ``[heads, C / heads]``.
        k: ``[N, L, C]``, with the dtype of ``q``.
        v: ``[N, L, C]``, with the dtype of ``q``.
        heads: number of heads; divides C.
        eps: added to the denominator, which is 0 if all channels of a query are negative.

    Returns:
        ``[N, L, C]``.
    """
    n, length, channels = q.shape
    queries, keys, values = (x.float().reshape(n, length, heads, channels // heads).permute(0, 2, 3, 1) for x in (q, k, v))
    state = functional.pad(values, (0, 0, 0, 1), value=1.0) @ torch.relu(keys).transpose(-1, -2)  # the last row sums the keys
    result = state @ torch.relu(queries)
    y = result[:, :, :-1] / (result[:, :, -1:] + eps)
    return y.permute(0, 3, 1, 2).reshape(n, length, channels).to(q.dtype)


RELU_LINEAR_ATTENTION = Operator(
    name="ReLULinearAttention",
    inputs={"q": "T", "k": "T", "v": "T"},
    attributes=("heads", "eps"),
    output="y",
    output_type="T",
    sizes={"channels": lambda q, k, v: q[-1]},
    # A 0 in a shape keeps the size of that axis; a -1 would be undefined for an empty batch.
    body="""
        batch_and_length = Constant <value_ints = [0, 0]> ()
        one = Constant <value_ints = [1]> ()
        heads_scalar = Constant <value_int: int = @heads> ()
        heads = Reshape (heads_scalar, one)
        channels_scalar = Constant <value_int: int = @channels> ()
        channels = Reshape (channels_scalar, one)
        head_size = Div (channels, heads)
        split_shape = Concat <axis = 0> (batch_and_length, heads, head_size)
        q_relu = Relu (q)
        q_float = Cast <to = 1> (q_relu)
        q_split = Reshape (q_float, split_shape)
        queries = Transpose <perm = [0, 2, 3, 1]> (q_split)
        k_relu = Relu (k)
        k_float = Cast <to = 1> (k_relu)
        k_split = Reshape (k_float, split_shape)
        keys = Transpose <perm = [0, 2, 1, 3]> (k_split)
        v_float = Cast <to = 1> (v)
        v_split = Reshape (v_float, split_shape)
        values = Transpose <perm = [0, 2, 3, 1]> (v_split)
        row_after = Constant <value_ints = [0, 0, 0, 0, 0, 0, 1, 0]> ()
        one_float = Constant <value_float = 1.0> ()
        values_and_ones = Pad <mode = "constant"> (values, row_after, one_float)
        state = MatMul (values_and_ones, keys)
        result = MatMul (state, queries)
        parts = Concat <axis = 0> (head_size, one)
        numerator, sums = Split <axis = 2> (result, parts)
        eps = Constant <value_float: float = @eps> ()
        denominator = Add (sums, eps)
        by_head = Div (numerator, denominator)
        by_token = Transpose <perm = [0, 3, 1, 2]> (by_head)
        shape = Concat <axis = 0> (batch_and_length, channels)
        merged = Reshape (by_token, shape)
        y = CastLike (merged, q)
    """,
)
