"""``MPSum``: a blend of two tensors that preserves magnitude (EDM2, arXiv 2312.02696, equation 88)."""

from __future__ import annotations

import math

from torch import Tensor

from scm_export.ops.mp_silu import mp_silu
from scm_export.ops.operator import Operator, balance_statements, emits_nodes


def mp_sum(a: Tensor, b: Tensor, t: float, clip: float = math.inf) -> Tensor:
    """``((1-t) a + t b) / sqrt((1-t)^2 + t^2)``.

    Args:
        a: any shape.
        b: with the shape and dtype of ``a``.
        t: weight of ``b``, in [0, 1].
        clip: bound on the magnitude of the result; infinity = no bound.
    """
    if emits_nodes():
        return MP_SUM.node(a, b, t=t, clip=clip)[0]
    scale = 1 / math.hypot(1 - t, t)
    y = a * ((1 - t) * scale) + b * (t * scale)
    return y if clip == math.inf else y.clamp(-clip, clip)


def mp_sum_silu(a: Tensor, b: Tensor, t: float, clip: float = math.inf) -> tuple[Tensor, Tensor]:
    """Return ``y = mp_sum(a, b, t, clip)`` and ``mp_silu(y)``."""
    if emits_nodes():
        y, activated = MP_SUM.node(a, b, outputs=2, t=t, clip=clip)
        return y, activated
    y = mp_sum(a, b, t, clip)
    return y, mp_silu(y)


MP_SUM = Operator(
    name="MPSum",
    inputs={"a": "T", "b": "T"},
    attributes=("t", "clip"),
    output="y",
    output_type="T",
    activated=True,
    body=f"""
        {balance_statements("weight_a", "weight_b")}
        weight_a_T = CastLike (weight_a, a)
        weight_b_T = CastLike (weight_b, b)
        weighted_a = Mul (a, weight_a_T)
        weighted_b = Mul (b, weight_b_T)
        sum = Add (weighted_a, weighted_b)
        clip = Constant <value_float: float = @clip> ()
        minus_clip = Neg (clip)
        high = CastLike (clip, a)
        low = CastLike (minus_clip, a)
        y = Clip (sum, low, high)
    """,
)
