"""torch's scaled_dot_product_attention in traced networks: as scm operators where they support it, else as standard ones, with torch's results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnxscript import ir
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from scm_export.graphs.functions import inline_functions
from scm_export.graphs.trace import trace_map
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from support import native_library

onnxruntime = load_onnxruntime()

LENGTH, CHANNELS, TOKENS = 6, 24, 5


def split(x: Tensor, heads: int) -> Tensor:
    """``[N, L, C]`` as ``[N, heads, L, C / heads]``, as diffusers does it."""
    return x.reshape(x.shape[0], -1, heads, x.shape[-1] // heads).transpose(1, 2)


def text(x: Tensor) -> Tensor:
    """Keys and values of another length than the queries."""
    return torch.cat([x[:, :TOKENS] * 2, x[:, :2]], dim=1).sin()


def hidden(x: Tensor) -> Tensor:
    """A Boolean mask ``[N, 1, 1, L]`` that differs by sample and never hides the first key."""
    return torch.cat([torch.ones_like(x[:, :1, 0]), x[:, 1:, 0]], dim=1)[:, None, None] > 0


def attend(x: Tensor, heads: int = 4, key_heads: int | None = None, **arguments: Any) -> Tensor:
    q, k = split(x, heads), split(x[..., : CHANNELS // heads * (key_heads or heads)], key_heads or heads)
    return scaled_dot_product_attention(q, k, (k * 0.7).cos(), **arguments).transpose(1, 2).flatten(2)


def same(x: Tensor) -> Tensor:
    return scaled_dot_product_attention(x, x, x)


def grouped(x: Tensor) -> Tensor:
    """Attention of four heads ``[..., 4, L, D]`` to two."""
    return scaled_dot_product_attention(x, x[..., :2, :, :], x[..., 2:, :, :], enable_gqa=True)


def wide(x: Tensor, heads: int) -> Tensor:
    """``[N, heads, L, 264]``: more channels than the operators support."""
    return split(x.repeat(1, 1, 11 * heads), heads)


Case = tuple[str, Callable[[Tensor], Tensor]]
SUPPORTED: list[Case] = [
    ("self", attend),
    ("cross", lambda x: scaled_dot_product_attention(split(x, 4), split(text(x), 4), split(text(x) ** 2, 4)).transpose(1, 2).flatten(2)),
    ("scale", lambda x: attend(x, scale=0.9)),
    ("grouped keys", lambda x: attend(x, key_heads=2, enable_gqa=True)),
]
MASKED: list[Case] = [
    ("bool mask", lambda x: attend(x, attn_mask=hidden(x))),
    ("bool mask with a row that hides all keys", lambda x: attend(x, attn_mask=hidden(x) & (torch.arange(LENGTH)[:, None] != 2))),
    ("expanded mask", lambda x: attend(x, attn_mask=hidden(x).expand(-1, 4, LENGTH, -1), scale=0.4)),
    ("bias", lambda x: attend(x, attn_mask=x[:, None, :, :LENGTH])),
    ("bias by head, for all samples", lambda x: attend(x, attn_mask=torch.linspace(-2, 2, 4 * LENGTH * LENGTH).reshape(4, LENGTH, LENGTH))),
    ("lowest number", lambda x: attend(x, attn_mask=torch.where(hidden(x), 0.0, torch.finfo(torch.float32).min))),
    ("causal", lambda x: attend(x, is_causal=True)),
    ("grouped keys with a mask", lambda x: attend(x, key_heads=2, enable_gqa=True, attn_mask=hidden(x))),
]
STANDARD: list[Case] = [
    ("three axes", lambda x: scaled_dot_product_attention(x, x.cos(), x.sin())),
    ("five axes", lambda x: same(split(x, 4)[:, None])[:, 0].transpose(1, 2).flatten(2)),
    ("three axes, grouped keys", lambda x: grouped(split(x, 4)[0]).expand(x.shape[0], -1, -1, -1).flatten(1)),
    ("five axes, grouped keys", lambda x: grouped(split(x, 4)[:, None])[:, 0]),
    ("causal, three axes", lambda x: scaled_dot_product_attention(x, x, x, is_causal=True)),
    ("head size 264", lambda x: same(wide(x, 1))[:, 0]),
    ("keys for all samples", lambda x: scaled_dot_product_attention(split(x, 4), split(x[:1], 4), split(x[:1], 4)).flatten(2)),
    ("grouped keys, head size 264", lambda x: scaled_dot_product_attention(wide(x, 2), wide(x, 1), wide(x, 1), enable_gqa=True).flatten(2)),
]


class Network(nn.Module):
    """The results of several cases, side by side."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.cases = cases

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([case(x).flatten(1) for _, case in self.cases], dim=1)


def run(model: ir.Model, x: Tensor, *, native: bool) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if native:
        options.register_custom_ops_library(str(native_library()))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x.numpy()})[0])


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.domain == "scm"]


def inputs(samples: int) -> Tensor:
    return torch.randn(samples, LENGTH, CHANNELS, generator=torch.Generator().manual_seed(samples))


def traced(network: nn.Module, opset: int = 20) -> ir.Model:
    return trace_map("decode", network, inputs(2), "x", "y", opset)


@pytest.mark.parametrize(
    ("cases", "expected"),
    [(SUPPORTED, ["Attention"] * len(SUPPORTED)), (MASKED, ["MaskedAttention"] * len(MASKED)), (STANDARD, [])],
    ids=["supported", "masked", "standard"],
)
def test_attention_in_a_network_gives_torchs_results(cases: list[Case], expected: list[str]) -> None:
    model = traced(Network(cases))
    assert operators(model) == expected
    assert [node.op_type for node in model.graph].count("Softmax") == (0 if expected else len(cases))
    plain = ir.serde.from_proto(ir.to_proto(model))
    inline_functions(plain)
    assert operators(plain) == []
    for samples in (1, 3):
        x = inputs(samples)
        found = {"kernels": run(model, x, native=True), "function bodies": run(model, x, native=False), "without functions": run(plain, x, native=False)}
        start = 0
        for name, case in cases:
            result = case(x).flatten(1).numpy()
            for form, values in found.items():
                columns = values[:, start : start + result.shape[1]]
                np.testing.assert_allclose(columns, result, atol=1e-5, rtol=1e-5, err_msg=f"{name}, {form}, {samples} samples")
            start += result.shape[1]


@pytest.mark.parametrize("length", [40, 300])  # the exporter computes small masks, ONNX Runtime large ones
def test_causal_layers_share_one_mask(length: int) -> None:
    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x + attend(x, is_causal=True)
            return x

    x = torch.randn(2, length, CHANNELS, generator=torch.Generator().manual_seed(0))
    model = trace_map("decode", Causal(), x, "x", "y", 20)
    assert operators(model) == ["MaskedAttention"] * 3
    assert len({node.inputs[3] for node in model.graph if node.op_type == "MaskedAttention"}) == 1
    large = [value for value in model.graph.initializers.values() if value.const_value is not None and value.const_value.nbytes >= length**2]
    assert len(large) <= 1
    np.testing.assert_allclose(run(model, x, native=True), Causal()(x).numpy(), atol=1e-5, rtol=1e-5)


def test_the_operator_takes_the_place_of_the_standard_attention_of_newer_operator_sets() -> None:
    model = traced(Network(SUPPORTED[:1]), opset=23)
    assert operators(model) == ["Attention"]
    np.testing.assert_allclose(run(model, inputs(3), native=True), attend(inputs(3)).flatten(1).numpy(), atol=1e-5, rtol=1e-5)


def test_a_module_of_torch_that_attends_has_the_operator() -> None:
    attention = nn.MultiheadAttention(CHANNELS, 4, batch_first=True).eval()

    class SelfAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = attention(x, x, x, need_weights=False)[0]
            return y

    model = traced(SelfAttention())
    assert operators(model) == ["Attention"]
    np.testing.assert_allclose(run(model, inputs(3), native=True), SelfAttention()(inputs(3)).detach().numpy(), atol=1e-5, rtol=1e-5)


def test_onnxruntime_needs_no_transpose_around_the_operator(tmp_path: Path) -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(CHANNELS, CHANNELS) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            y = scaled_dot_product_attention(split(self.q(x), 4), split(self.k(x), 4), split(self.v(x), 4))
            return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]  # the output of a Linear

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(native_library()))
    options.log_severity_level = 3
    options.optimized_model_filepath = f"{tmp_path}/optimized.onnx"
    onnxruntime.InferenceSession(ir.to_proto(traced(Projected())).SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(f"{tmp_path}/optimized.onnx").graph.node]
    assert "Attention" in nodes
    assert "Transpose" not in nodes
