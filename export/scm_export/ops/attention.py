"""``Attention`` and ``MaskedAttention``: scaled dot-product attention as torch defines it, with the heads of a token next to each other.

Networks call :func:`torch.nn.functional.scaled_dot_product_attention`, which :mod:`scm_export.graphs.attention` replaces while a network is traced.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from scm_export.ops.operator import Operator

MAX_SIZE = 256
"""Channels per head that the kernels support."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float) -> Tensor:
    """``softmax(scale q kᵀ + mask) v`` for each head. This is the reference of the operators.

    Args:
        q: ``[N, L, heads, D]``, any floating dtype.
        k: ``[N, S, key_heads, D]``; key_heads divides heads. Heads of q with the same index, divided by heads / key_heads, share one of k and v.
        v: ``[N, S, key_heads, E]``.
        mask: ``[N or 1, heads or 1, L or 1, S]``, with the dtype of ``q``. A query whose mask is -infinity for every key gives 0.
        scale: factor of the scores, usually ``1 / sqrt(D)``.

    Returns:
        ``[N, L, heads, E]``.
    """
    q_turned, k_turned, v_turned = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[2] != k.shape[2]
    return functional.scaled_dot_product_attention(q_turned, k_turned, v_turned, attn_mask=mask, scale=scale, enable_gqa=grouped).transpose(1, 2)


# Heads that share keys are an axis of their own, so that the products broadcast. A 0 in a shape keeps the size of that axis.
_SCORES = """
        q_shape = Constant <value_ints: ints = @q_shape> ()
        q_grouped = Reshape (q, q_shape)
        q_heads = Transpose <perm = [0, 2, 3, 1, 4]> (q_grouped)
        scale = Constant <value_float: float = @scale> ()
        scale_T = CastLike (scale, q)
        q_scaled = Mul (q_heads, scale_T)
        group_axis = Constant <value_ints = [2]> ()
        k_turned = Transpose <perm = [0, 2, 3, 1]> (k)
        k_heads = Unsqueeze (k_turned, group_axis)
        v_turned = Transpose <perm = [0, 2, 1, 3]> (v)
        v_heads = Unsqueeze (v_turned, group_axis)
        scores = MatMul (q_scaled, k_heads)
"""
_RESULT = """
        y_turned = Transpose <perm = [0, 3, 1, 2, 4]> (y_heads)
        y_shape = Constant <value_ints: ints = @y_shape> ()
        y = Reshape (y_turned, y_shape)
"""

ATTENTION = Operator(
    name="Attention",
    inputs={"q": "T", "k": "T", "v": "T"},
    attributes=("scale",),
    output="y",
    output_type="T",
    sizes={
        "q_shape": lambda q, k, v: (0, 0, k[2], q[2] // k[2], q[3]),
        "y_shape": lambda q, k, v: (0, 0, q[2], v[3]),
    },
    body=f"""{_SCORES}
        weights = Softmax <axis = -1> (scores)
        y_heads = MatMul (weights, v_heads)
    {_RESULT}""",
)

MASKED_ATTENTION = Operator(
    name="MaskedAttention",
    inputs={"q": "T", "k": "T", "v": "T", "mask": "T"},
    attributes=("scale",),
    output="y",
    output_type="T",
    sizes={
        "q_shape": lambda q, k, v, mask: (0, 0, k[2], q[2] // k[2], q[3]),
        "mask_shape": lambda q, k, v, mask: (0, 0, 0, 1, 1) if mask[1] == 1 else (0, 0, 0, k[2], q[2] // k[2]),
        "y_shape": lambda q, k, v, mask: (0, 0, q[2], v[3]),
    },
    # Where is computed in float32: not every provider has it for bfloat16.
    body=f"""{_SCORES}
        mask_turned = Transpose <perm = [0, 2, 3, 1]> (mask)
        mask_shape = Constant <value_ints: ints = @mask_shape> ()
        mask_grouped = Reshape (mask_turned, mask_shape)
        mask_heads = Transpose <perm = [0, 3, 4, 1, 2]> (mask_grouped)
        masked = Add (scores, mask_heads)
        weights = Softmax <axis = -1> (masked)
        attended = MatMul (weights, v_heads)
        mask_float = Cast <to = 1> (mask_heads)
        key_axis = Constant <value_ints = [-1]> ()
        largest = ReduceMax <keepdims = 1> (mask_float, key_axis)
        hidden = IsInf <detect_negative = 1, detect_positive = 0> (largest)
        zero = Constant <value_float = 0.0> ()
        attended_float = Cast <to = 1> (attended)
        kept = Where (hidden, zero, attended_float)
        y_heads = CastLike (kept, q)
    {_RESULT}""",
)
