"""Convolutions and linear layers of custom networks become operators in the traced step, which run on matrix units."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, inliner
from onnxscript import ir
from torch import Tensor, nn

from scm_export.graphs.trace import trace_step
from scm_export.model import ImageDecoder, Model
from scm_export.parametrisation import Step
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.ort.options import MATMUL_PRECISION
from support import BFLOAT16, native_library

onnxruntime = load_onnxruntime()

LAST, FIRST = "scm.channels_last", "scm.channels_first"


class Network(nn.Module):
    """Has layers that become operators, and layers that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)  # too few channels
        self.window, self.point = nn.Conv2d(32, 48, 3, padding=1), nn.Conv2d(48, 32, 1, bias=False)
        self.linear, self.biased = nn.Linear(32, 32, bias=False), nn.Linear(32, 32)
        self.wide = nn.Linear(32, 32, bias=False).double()
        self.others = nn.ModuleList(
            [
                nn.Conv2d(32, 32, 3, padding=1, groups=2),
                nn.Conv2d(32, 32, 3, padding=2, dilation=2),
                nn.Conv2d(32, 32, 5, padding=2),
                nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular"),
                nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.ConvTranspose2d(32, 32, 2, stride=2)),
                nn.Sequential(nn.Conv2d(32, 32, 3), nn.ZeroPad2d(1)),
            ]
        )
        self.padded = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(32, 32, 3))  # the exporter fuses the two into one node
        self.last = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.point(self.window(x).relu())
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens @ tokens.transpose(1, 2) @ self.biased(self.linear(tokens)) / 48
        tokens = self.wide(tokens.double()).float()
        x = x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        for other in self.others:
            x = x + other(x)
        y: Tensor = self.last(x + self.padded(x))
        return y


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model("test", Step(Network(), 0.5), (3, 6, 8), sigma_data=0.5, initial_scale=0.5, times={1: (1.5, 0.0)}, decoder=ImageDecoder(1.0, 0.0))


@pytest.fixture(scope="module")
def traced(model: Model) -> ModelProto:
    return ir.to_proto(trace_step(model, 20))


@pytest.fixture(scope="module")
def plain(model: Model) -> ModelProto:
    """The same step with no operators of ours."""
    return ir.to_proto(trace_step(model, 20, operators=False))


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 2, 3, 6, 8, generator=generator)
    return {"x": x, "t": torch.tensor([1.5, 0.9]), "t_next": torch.tensor([0.4, 0.0]), "noise": noise}


def run(model: ModelProto, precision: str | None = None) -> NDArray[Any]:
    """Run in a session with the kernels at a precision or, without one, in plain ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    if precision is not None:
        options.add_session_config_entry(MATMUL_PRECISION, precision)
        options.register_custom_ops_library(str(native_library()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {name: value.numpy() for name, value in inputs().items()})[0])


def test_supported_layers_become_operators(traced: ModelProto, plain: ModelProto) -> None:
    nodes = Counter((node.domain, node.op_type) for node in traced.graph.node)
    assert (nodes[FIRST, "Conv"], nodes[LAST, "MatMul"]) == (3, 2)
    before = Counter(node.op_type for node in plain.graph.node)
    assert nodes["", "Conv"] == before["Conv"] - 3 > 0
    assert nodes["", "MatMul"] == before["MatMul"] - 2 == 3  # two products of activations only, one in float64


def test_without_the_kernels_the_function_bodies_equal_the_original_nodes(model: Model, traced: ModelProto, plain: ModelProto) -> None:
    inlined = inliner.inline_local_functions(traced)
    pads_of_both = [
        sorted(list(attribute.ints) for node in graph.graph.node if node.op_type == "Conv" for attribute in node.attribute if attribute.name == "pads")
        for graph in (inlined, plain)
    ]
    assert pads_of_both[0] == pads_of_both[1]
    expected = model.step(**inputs(), conditioning={})
    np.testing.assert_allclose(run(traced), expected.detach().numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not BFLOAT16, reason="needs a processor with AMX or AVX512-BF16")
def test_the_kernels_run_if_the_processor_supports_them(traced: ModelProto) -> None:
    error = np.abs(run(traced, "medium") - run(traced)).max()
    assert 1e-4 < error < 0.05  # larger than float32's rounding error: the kernels ran
    assert np.abs(run(traced, "high") - run(traced)).max() < 1e-4
