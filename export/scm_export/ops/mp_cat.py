"""``MPCat``: a concatenation over channels that preserves magnitude (EDM2, arXiv 2312.02696, equation 103)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scm_export.ops.mp_silu import mp_silu
from scm_export.ops.operator import Operator, balance_statements, emits_nodes


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Concatenate along channels so that ``a`` and ``b`` contribute in the ratio ``1-t : t``, regardless of their numbers of channels.

    Args:
        a: ``[..., A]``.
        b: ``[..., B]``, with the dtype of ``a``.
        t: weight of ``b`` in the magnitude of the result, in [0, 1].

    Returns:
        ``[..., A + B]``: with ``s = sqrt((A + B) / ((1-t)^2 + t^2))``, ``[a s (1-t) / sqrt(A), b s t / sqrt(B)]``.
    """
    if emits_nodes():
        return MP_CAT.node(a, b, shape=_joined_shape(a, b), t=t)[0]
    channels_a, channels_b = a.shape[-1], b.shape[-1]
    scale = math.sqrt((channels_a + channels_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(channels_a)), b * (scale * t / math.sqrt(channels_b))], dim=-1)


def mp_cat_silu(a: Tensor, b: Tensor, t: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return ``y = mp_cat(a, b, t)`` and ``mp_silu(y)``."""
    if emits_nodes():
        y, activated = MP_CAT.node(a, b, outputs=2, shape=_joined_shape(a, b), t=t)
        return y, activated
    y = mp_cat(a, b, t)
    return y, mp_silu(y)


def _joined_shape(a: Tensor, b: Tensor) -> tuple[int, ...]:
    return (*a.shape[:-1], a.shape[-1] + b.shape[-1])


MP_CAT = Operator(
    name="MPCat",
    inputs={"a": "T", "b": "T"},
    attributes=("t",),
    output="y",
    output_type="T",
    activated=True,
    sizes={"channels_a": lambda a, b: a[-1], "channels_b": lambda a, b: b[-1]},
    # sqrt(A + B) / sqrt(A) = sqrt(1 + B / A) needs the fewest nodes.
    body=f"""
        {balance_statements("share_a", "share_b")}
        size_a = Constant <value_int: int = @channels_a> ()
        size_b = Constant <value_int: int = @channels_b> ()
        channels_a = Cast <to = 1> (size_a)
        channels_b = Cast <to = 1> (size_b)
        b_to_a = Div (channels_b, channels_a)
        a_to_b = Div (channels_a, channels_b)
        joined_to_a = Add (b_to_a, one)
        joined_to_b = Add (a_to_b, one)
        scale_a = Sqrt (joined_to_a)
        scale_b = Sqrt (joined_to_b)
        weight_a = Mul (scale_a, share_a)
        weight_b = Mul (scale_b, share_b)
        weight_a_T = CastLike (weight_a, a)
        weight_b_T = CastLike (weight_b, b)
        weighted_a = Mul (a, weight_a_T)
        weighted_b = Mul (b, weight_b_T)
        y = Concat <axis = -1> (weighted_a, weighted_b)
    """,
)
