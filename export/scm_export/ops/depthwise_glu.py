"""``DepthwiseGLU``: the middle of the feed-forward block of SANA and of its decoder DC-AE (arXiv 2410.10629, Mix-FFN; ``GLUMBConv`` in diffusers)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from scm_export.ops.operator import Operator


def depthwise_glu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """``a silu(g)``, where ``[a, g]`` are the halves of the channels of a depthwise 3x3 convolution of ``silu(x)`` with zero padding.

    This is the reference of the operator. No network calls it: :mod:`scm_export.graphs.transformer_blocks` finds the computation in traced networks.

    Args:
        x: ``[N, 2 C, H, W]``, any floating dtype.
        w: ``[2 C, 1, 3, 3]``, with the dtype of ``x``.
        b: ``[2 C]``, with the dtype of ``x``.

    Returns:
        ``[N, C, H, W]``.
    """
    a, g = functional.conv2d(functional.silu(x), w, b, padding=1, groups=w.shape[0]).chunk(2, dim=1)
    return a * functional.silu(g)


DEPTHWISE_GLU = Operator(
    name="DepthwiseGLU",
    inputs={"x": "T", "w": "T", "b": "T"},
    output="y",
    output_type="T",
    sizes={"channels": lambda x, w, b: x[1]},
    body="""
        x_sigmoid = Sigmoid (x)
        x_silu = Mul (x, x_sigmoid)
        convolved = Conv <group: int = @channels, pads = [1, 1, 1, 1]> (x_silu, w, b)
        a, g = Split <axis = 1, num_outputs = 2> (convolved)
        g_sigmoid = Sigmoid (g)
        g_silu = Mul (g, g_sigmoid)
        y = Mul (a, g_silu)
    """,
)
