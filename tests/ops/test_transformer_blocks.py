"""Gated feed-forward layers and linear attention of diffusers become operators in a traced network; computations that differ in a detail do not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import GLUMBConv
from numpy.typing import NDArray
from onnx import ModelProto
from onnxscript import ir
from torch import Tensor, nn
from torch.nn import functional

from scm_export.graphs.trace import trace_map
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from support import native_library

onnxruntime = load_onnxruntime()

CHANNELS, SIDE, HEADS = 16, 6, 2
OPERATORS = ("GEGLU", "DepthwiseGLU", "ReLULinearAttention")


class OnTokens(nn.Module):
    """Applies a network to the tokens of a feature map."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x.flatten(2).transpose(1, 2))
        turned: Tensor = y.transpose(1, 2).unflatten(2, x.shape[2:])
        return turned


class Blocks(nn.Module):
    """One layer of each kind, as diffusers defines it."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = GLUMBConv(CHANNELS, CHANNELS, 2.5, norm_type=None, residual_connection=False)
        attention = Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS, bias=False, out_bias=True, processor=SanaLinearAttnProcessor2_0())
        self.attention = OnTokens(attention)
        self.feed_forward = OnTokens(FeedForward(CHANNELS, activation_fn="geglu"))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = x + layer(x)
        return x


class GatedConvolution(nn.Module):
    """SANA's gated convolution, with a different convolution, or with a result that is used once more."""

    def __init__(self, *, twice: bool = False, groups: int = 2 * CHANNELS, **options: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, 2 * CHANNELS, 1)
        self.depthwise = nn.Conv2d(2 * CHANNELS, 2 * CHANNELS, **{"kernel_size": 3, "padding": 1, **options}, groups=groups)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        convolved = self.depthwise(functional.silu(self.first(x)))
        a, g = convolved.chunk(2, dim=1)
        y: Tensor = a * functional.silu(g) + (convolved.mean() if self.twice else 0)
        return y


class GatedLayer(nn.Module):
    """GEGLU with another gate."""

    def __init__(self, gate: Any, *, bias: bool = True, first: bool = False) -> None:
        super().__init__()
        self.linear, self.gate, self.first = nn.Linear(CHANNELS, 2 * CHANNELS, bias=bias), gate, first

    def forward(self, x: Tensor) -> Tensor:
        a, g = self.linear(x).chunk(2, dim=-1)
        y: Tensor = self.gate(a) * g if self.first else a * self.gate(g)
        return y


class OtherAttention(nn.Module):
    """Linear attention whose padding is not of ones."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.transpose(1, 2).unflatten(1, (HEADS, -1))
        positive = torch.relu(heads)
        result = functional.pad(heads, (0, 0, 0, 1), value=2.0) @ positive.transpose(2, 3) @ positive
        return (result[:, :, :-1] / (result[:, :, -1:] + 1e-15)).flatten(1, 2).transpose(1, 2)


class Others(nn.Module):
    """Layers that resemble those of :class:`Blocks`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                GatedConvolution(kernel_size=5, padding=2),
                GatedConvolution(padding=2, dilation=2),
                GatedConvolution(groups=CHANNELS),
                GatedConvolution(twice=True),
                OnTokens(GatedLayer(nn.GELU("tanh"))),
                OnTokens(GatedLayer(nn.SiLU())),
                OnTokens(GatedLayer(nn.GELU(), bias=False)),
                OnTokens(GatedLayer(nn.GELU(), first=True)),
                OnTokens(OtherAttention()),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=1)


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=["float32", "float16"])
def blocks(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return Blocks().to(request.param).eval()


def traced(network: nn.Module) -> ModelProto:
    dtype = next(network.parameters()).dtype
    return ir.to_proto(trace_map("test", network, torch.zeros(2, CHANNELS, SIDE, SIDE, dtype=dtype), "x", "y", 20))


def counts(model: ModelProto) -> dict[str, int]:
    found = Counter(node.op_type for node in model.graph.node if node.domain == "scm")
    return {name: found[name] for name in OPERATORS}


def run(model: ModelProto, x: Tensor, *, native: bool) -> NDArray[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if native:
        options.register_custom_ops_library(str(native_library()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: NDArray[Any] = session.run(None, {"x": x.numpy()})[0]
    return found


def expect_close(network: nn.Module, model: ModelProto) -> None:
    """Compare bodies and kernels with PyTorch in float32, for batches of one and three."""
    dtype = next(network.parameters()).dtype
    for n in (1, 3):
        x = torch.randn(n, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(n)).to(dtype)
        with torch.no_grad():
            expected = network.float()(x.float()).numpy()
        network.to(dtype)
        for native in (False, True):
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            np.testing.assert_allclose(run(model, x, native=native).astype(np.float32), expected, rtol=tolerance, atol=tolerance, err_msg=f"native: {native}")


def test_the_layers_of_diffusers_become_operators(blocks: nn.Module) -> None:
    model = traced(blocks)
    assert counts(model) == dict.fromkeys(OPERATORS, 1)
    expect_close(blocks, model)


def test_layers_that_differ_in_a_detail_stay_as_they_are() -> None:
    torch.manual_seed(0)
    others = Others().eval()
    model = traced(others)
    assert counts(model) == dict.fromkeys(OPERATORS, 0)
    expect_close(others, model)
