"""``MPSiLU``: SiLU that preserves magnitude (EDM2, arXiv 2312.02696, equation 81)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from scm_export.ops.operator import Operator, emits_nodes, silu_statements


def mp_silu(x: Tensor) -> Tensor:
    """SiLU divided by 0.596, its root mean square for inputs from N(0, 1). ``x`` has any shape."""
    if emits_nodes():
        return MP_SILU.node(x)[0]
    return functional.silu(x) / 0.596


MP_SILU = Operator(name="MPSiLU", inputs={"x": "T"}, output="y", output_type="T", body=silu_statements("x", "y"))
