"""Combinations of operators that a CUDA kernel computes in one launch: a convolution or a product with what follows it in a block of EDM2.

Their bodies consist of the operators that they combine. Without kernels for the domain ``scm.fused`` the same operators run, with the same results.
``scales`` and ``modulation`` are ``[N, S]`` and hold the columns of several blocks; a block uses the columns from ``begin`` to ``end``, exclusive.
"""

from __future__ import annotations

import math

from torch import Tensor

from scm_export.ops.dense import CONV3X3, MATMUL, conv3x3, matmul
from scm_export.ops.modulate_silu import MODULATE_SILU, modulate_silu
from scm_export.ops.mp_sum import MP_SUM, mp_sum
from scm_export.ops.norm_modulate_silu import NORM_MODULATE_SILU, norm_modulate_silu
from scm_export.ops.operator import Operator, emits_nodes
from scm_runtime.bundle.manifest import FUSED_DOMAIN


def conv3x3_modulate_silu(x: Tensor, w: Tensor, scales: Tensor, begin: int, end: int) -> Tensor:
    """``mp_silu(conv3x3(x, w) * scales[:, begin:end])``.

    Args:
        x: ``[N, H, W, I]``, any floating dtype.
        w: ``[O, I, 3, 3]``, with the dtype of ``x``.
        scales: ``[N, S]``, with the dtype of ``x``.
        begin: first column of ``scales`` that is used.
        end: column after the last one; ``end - begin`` is O.

    Returns:
        ``[N, H, W, O]``.
    """
    if emits_nodes():
        return CONV3X3_MODULATE_SILU.node(x, w, scales, shape=[*x.shape[:-1], w.shape[0]], begin=[begin], end=[end])[0]
    return modulate_silu(conv3x3(x, w), scales[:, begin:end])


def conv3x3_mp_sum(x: Tensor, w: Tensor, skip: Tensor, t: float, clip: float = math.inf) -> Tensor:
    """``mp_sum(skip, conv3x3(x, w), t, clip)``.

    Args:
        x: ``[N, H, W, I]``, any floating dtype.
        w: ``[O, I, 3, 3]``, with the dtype of ``x``.
        skip: ``[N, H, W, O]``, with the dtype of ``x``.
        t: weight of the convolution, in [0, 1].
        clip: bound on the magnitude of the result; infinity = no bound.
    """
    if emits_nodes():
        return CONV3X3_MP_SUM.node(x, w, skip, shape=skip.shape, t=t, clip=clip)[0]
    return mp_sum(skip, conv3x3(x, w), t, clip)


def matmul_mp_sum(x: Tensor, w: Tensor, skip: Tensor, t: float, clip: float = math.inf) -> Tensor:
    """``mp_sum(skip, matmul(x, w), t, clip)``.

    Args:
        x: ``[..., I]``, any floating dtype.
        w: ``[O, I]``, with the dtype of ``x``.
        skip: ``[..., O]``, with the dtype of ``x``.
        t: weight of the product, in [0, 1].
        clip: bound on the magnitude of the result; infinity = no bound.
    """
    if emits_nodes():
        return MATMUL_MP_SUM.node(x, w.t(), skip, shape=skip.shape, t=t, clip=clip)[0]
    return mp_sum(skip, matmul(x, w), t, clip)


def norm_modulate_silu_columns(y: Tensor, modulation: Tensor, begin: int, end: int, eps: float = 1e-4) -> Tensor:
    """``norm_modulate_silu(y, modulation[:, begin:end], eps)``.

    Args:
        y: ``[N, ..., C]``, any floating dtype.
        modulation: ``[N, S]``, with the dtype of ``y``.
        begin: first column of ``modulation`` that is used.
        end: column after the last one; ``end - begin`` is 2 C.
        eps: epsilon of the normalizations.
    """
    if emits_nodes():
        return NORM_MODULATE_SILU_COLUMNS.node(y, modulation, begin=[begin], end=[end], eps=eps)[0]
    return norm_modulate_silu(y, modulation[:, begin:end], eps)


def _columns_statements(values: str, columns: str) -> str:
    """Statements for ``columns = values[:, begin:end]``, with the attributes begin and end, lists of one element."""
    return f"""
        begin = Constant <value_ints: ints = @begin> ()
        end = Constant <value_ints: ints = @end> ()
        column_axis = Constant <value_ints = [1]> ()
        {columns} = Slice ({values}, begin, end, column_axis)
    """


CONV3X3_MODULATE_SILU = Operator(
    domain=FUSED_DOMAIN,
    name="Conv3x3ModulateSiLU",
    inputs={"x": "T", "w": "T", "scales": "T"},
    attributes=("begin", "end"),
    output="z",
    output_type="T",
    calls=(CONV3X3, MODULATE_SILU),
    body=f"""
        {_columns_statements("scales", "scale")}
        y = scm.channels_last.Conv3x3 (x, w)
        z = scm.ModulateSiLU (y, scale)
    """,
)

CONV3X3_MP_SUM = Operator(
    domain=FUSED_DOMAIN,
    name="Conv3x3MPSum",
    inputs={"x": "T", "w": "T", "skip": "T"},
    attributes=("t", "clip"),
    output="z",
    output_type="T",
    calls=(CONV3X3, MP_SUM),
    body="""
        y = scm.channels_last.Conv3x3 (x, w)
        z = scm.MPSum <t: float = @t, clip: float = @clip> (skip, y)
    """,
)

MATMUL_MP_SUM = Operator(
    domain=FUSED_DOMAIN,
    name="MatMulMPSum",
    inputs={"x": "T", "w": "T", "skip": "T"},
    attributes=("t", "clip"),
    output="z",
    output_type="T",
    calls=(MATMUL, MP_SUM),
    body="""
        y = scm.channels_last.MatMul (x, w)
        z = scm.MPSum <t: float = @t, clip: float = @clip> (skip, y)
    """,
)

NORM_MODULATE_SILU_COLUMNS = Operator(
    domain=FUSED_DOMAIN,
    name="NormModulateSiLU",
    inputs={"y": "T", "modulation": "T"},
    attributes=("eps", "begin", "end"),
    output="z",
    output_type="T",
    calls=(NORM_MODULATE_SILU,),
    body=f"""
        {_columns_statements("modulation", "columns")}
        z = scm.NormModulateSiLU <eps: float = @eps> (y, columns)
    """,
)
