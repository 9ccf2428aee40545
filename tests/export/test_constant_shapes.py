"""Shapes in traced graphs: constant where only the batch size is unknown, computed where they have to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import ModelProto, parser
from onnxscript import ir
from torch import Tensor, nn
from torch.nn import functional

from scm_export.graphs.constant_shapes import use_constant_shapes
from scm_export.graphs.trace import trace_map
from scm_runtime.common.load_onnxruntime import load_onnxruntime

onnxruntime = load_onnxruntime()


class Norms(nn.Module):
    """A group norm and a self-attention, which torch.onnx exports with shapes that the graph computes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(2, 8), nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=2))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + attended.transpose(1, 2).reshape(x.shape)


def test_a_traced_network_has_no_computed_shapes_and_the_right_results_for_any_batch() -> None:
    torch.manual_seed(0)
    network = Norms()
    with torch.no_grad():
        model = ir.to_proto(trace_map("decode", network, torch.zeros(2, 8, 3, 5), "x", "image", 20))
        assert "Shape" not in {node.op_type for node in model.graph.node}
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        for n in (1, 2, 7):
            x = torch.randn(n, 8, 3, 5)
            np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], network(x).numpy(), atol=1e-5)


def graph(*statements: str, x: str = "n, 4, 6") -> ModelProto:
    """A graph that reshapes x by what the statements compute as ``target``."""
    return parser.parse_model(f"""
        <ir_version: 9, opset_import: ["": 20]>
        g (float[{x}] x) => (float y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}}, int64[1] minus = {{-1}}>
        {{ {" ".join(statements)} y = Reshape (x, target) }}
    """)


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (graph("target = Shape (x)"), [0, 4, 6]),
        (graph("s = Shape (x)", "b = Slice (s, zero, one)", "target = Concat <axis = 0> (b, minus)"), [0, -1]),
        (graph("s = Shape (x)", "b = Slice (s, zero, one)", "c = Slice (s, one, three)", "target = Concat <axis = 0> (one, one, b, c)"), [1, 1, -1, 4, 6]),
        (graph("b = Shape <end = 1> (x)", "c = Shape <start = -2> (x)", "target = Concat <axis = 0> (c, b)"), [4, 6, -1]),
        (graph("target = Shape (x)", x="n, 4, m"), [0, 4, 0]),
        (graph("s = Shape (x)", "m = Slice (s, two, three)", "target = Concat <axis = 0> (minus, m)", x="n, 4, m"), None),
        (graph("b = Shape <end = 1> (x)", "twice = Mul (b, two)", "target = Concat <axis = 0> (twice, minus)"), None),
        (graph("target = Shape (x)", x="n, 0, 6"), None),
    ],
)
def test_a_computed_target_becomes_a_constant_where_one_size_at_most_is_unknown(model: ModelProto, target: list[int] | None) -> None:
    changed = ir.from_proto(model)
    use_constant_shapes(changed)
    node = next(node for node in changed.graph if node.op_type == "Reshape")
    shape = node.inputs[1]
    assert shape is not None
    assert (None if shape.const_value is None else shape.const_value.numpy().tolist()) == target
