"""``GEGLU``: the gated activation of the feed-forward layers of diffusers' transformer blocks (arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from scm_export.ops.operator import Operator


def geglu(x: Tensor, b: Tensor) -> Tensor:
    """``a gelu(g)`` with ``[a, g] = x + b``, and the exact gelu, ``gelu(g) = g Φ(g)``.

    This is the reference of the operator. No network calls it: :mod:`scm_export.graphs.transformer_blocks` finds the computation in traced networks.

    Args:
        x: ``[..., 2 C]``, any floating dtype; the product of a linear layer.
        b: ``[2 C]``, with the dtype of ``x``; the bias of that layer.

    Returns:
        ``[..., C]``.
    """
    a, g = (x + b).chunk(2, dim=-1)
    return a * functional.gelu(g)


GEGLU = Operator(
    name="GEGLU",
    inputs={"x": "T", "b": "T"},
    output="y",
    output_type="T",
    # The operator Gelu exists only since opset 20. ONNX Runtime recognizes these statements and uses its own kernel.
    body="""
        biased = Add (x, b)
        a, g = Split <axis = -1, num_outputs = 2> (biased)
        root = Constant <value_float = 1.4142135> ()
        root_T = CastLike (root, x)
        one = Constant <value_float = 1.0> ()
        one_T = CastLike (one, x)
        half = Constant <value_float = 0.5> ()
        half_T = CastLike (half, x)
        scaled = Div (g, root_T)
        erf = Erf (scaled)
        twice_phi = Add (erf, one_T)
        twice_gelu = Mul (g, twice_phi)
        gelu = Mul (twice_gelu, half_T)
        y = Mul (a, gelu)
    """,
)
