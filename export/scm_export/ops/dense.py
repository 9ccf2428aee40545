"""Convolutions and matrix products: standard ONNX operators, which the native library can run on a processor's matrix units.

``Conv3x3`` and ``MatMul`` are for channels-last feature maps, ``Conv`` for channels-first ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from scm_export.ops.operator import Operator, emits_nodes
from scm_runtime.bundle.manifest import CHANNELS_FIRST_DOMAIN, CHANNELS_LAST_DOMAIN


def conv3x3(x: Tensor, w: Tensor) -> Tensor:
    """3x3 convolution with zero padding of 1.

    Args:
        x: ``[N, H, W, I]``, any floating dtype.
        w: ``[O, I, 3, 3]``, with the dtype of ``x``.

    Returns:
        ``[N, H, W, O]``.
    """
    if emits_nodes():
        return CONV3X3.node(x, w, shape=[*x.shape[:-1], w.shape[0]])[0]
    return functional.conv2d(x.permute(0, 3, 1, 2), w, padding=1).permute(0, 2, 3, 1)


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """``x wᵀ`` for ``x``, ``[..., I]``, and ``w``, ``[O, I]``, like ``torch.nn.functional.linear``, in any floating dtype."""
    if emits_nodes():
        return MATMUL.node(x, w.t(), shape=[*x.shape[:-1], w.shape[0]])[0]
    return functional.linear(x, w)


def conv(x: Tensor, w: Tensor, b: Tensor, pads: Sequence[int]) -> Tensor:
    """Convolution that keeps the size of the feature map.

    This is the reference of the operator ``Conv``. No network calls it: :mod:`scm_export.graphs.dense_layers` replaces convolutions of traced networks.

    Args:
        x: ``[N, I, H, W]``, any floating dtype.
        w: ``[O, I, 3, 3]`` or ``[O, I, 1, 1]``, with the dtype of ``x``.
        b: ``[O]``, with the dtype of ``x``.
        pads: zero padding above, left, below and right: 1 for 3x3, 0 for 1x1.

    Returns:
        ``[N, O, H, W]``.
    """
    return functional.conv2d(x, w, b, padding=(pads[0], pads[1]))


CONV3X3 = Operator(
    domain=CHANNELS_LAST_DOMAIN,
    name="Conv3x3",
    inputs={"x": "T", "w": "T"},
    output="y",
    output_type="T",
    body="""
        channels_first = Transpose <perm = [0, 3, 1, 2]> (x)
        convolved = Conv <pads = [1, 1, 1, 1]> (channels_first, w)
        y = Transpose <perm = [0, 2, 3, 1]> (convolved)
    """,
)

MATMUL = Operator(domain=CHANNELS_LAST_DOMAIN, name="MatMul", inputs={"x": "T", "w": "T"}, output="y", output_type="T", body="y = MatMul (x, w)")

CONV = Operator(
    domain=CHANNELS_FIRST_DOMAIN,
    name="Conv",
    inputs={"x": "T", "w": "T", "b": "T"},
    output="y",
    output_type="T",
    body="y = Conv <pads: ints = @pads> (x, w, b)",
    attributes=("pads",),
)
