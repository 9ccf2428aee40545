"""Normalizations of traced networks become one operator each, together with the casts, the modulation and the SiLU around them, and compute what PyTorch does."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from onnxscript import ir
from torch import Tensor, nn
from torch.nn import functional

from scm_export.graphs.functions import inline_functions
from scm_export.graphs.trace import trace_map
from scm_export.precision import Precision
from scm_export.verification.tolerances import OP_TOLERANCE
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from support import native_library

onnxruntime = load_onnxruntime()

CHANNELS = 12


class RMSNorm(nn.Module):
    """Written as in diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Norms(nn.Module):
    """All forms, one after another: those of U-Nets on ``[N, C, H, W]``, then those of transformers on ``[N, H W, C]``."""

    def __init__(self) -> None:
        super().__init__()
        self.silu, self.modulated, self.swapped, self.plain = (nn.GroupNorm(groups, CHANNELS) for groups in (4, 3, 2, 1))
        self.tokens, self.modulated_tokens = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS, elementwise_affine=False, eps=1e-6)
        self.rms = RMSNorm()
        self.embedding = nn.Linear(CHANNELS, 2 * CHANNELS)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        embedding = self.embedding(x.mean((2, 3)))
        scale, shift = embedding[:, :, None, None].chunk(2, dim=1)
        x = x + functional.silu(self.silu(x))
        x = x + functional.silu(self.modulated(x) * (1 + scale) + shift)
        x = x + functional.silu(shift * 2 + (scale * 3 + 1) * self.swapped(x))  # not two halves of one tensor
        x = x + self.plain(x)
        tokens = self.plain(x).flatten(2).transpose(1, 2)  # of another rank from here on
        tokens = tokens + self.tokens(tokens)
        factor, offset = embedding.unsqueeze(1).chunk(2, dim=-1)
        tokens = tokens + (self.modulated_tokens(tokens) * (1 + factor) + offset)
        return tokens + self.rms(tokens)


def traced(network: nn.Module, dtype: torch.dtype, opset: int = 20) -> ir.Model:
    precision = Precision(network)
    precision.compute_dtype = dtype
    return trace_map("norms", precision, torch.randn(2, CHANNELS, 5, 4), "x", "y", opset)


def norms_in(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph if "Norm" in node.op_type)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Norms().eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_become_one_operator_with_what_surrounds_them(network: nn.Module, dtype: torch.dtype) -> None:
    model = traced(network, dtype, 20 if dtype != torch.bfloat16 else 22)
    assert norms_in(model) == {"GroupNormSiLU": 1, "GroupNormModulateSiLU": 2, "GroupNorm": 2, "LayerNorm": 1, "LayerNormModulate": 1, "RMSNorm": 1}
    assert not {"Sigmoid", "Sqrt", "Split", "Pow"} & {node.op_type for node in model.graph} - ({"Split"} if dtype == torch.float32 else {"Split"})
    for node in model.graph:
        if "Norm" in node.op_type and node.op_type != "RMSNorm":
            assert node.inputs[0] is not None
            assert str(node.inputs[0].dtype) == str(node.outputs[0].dtype)
    kept = [node.inputs[0].dtype for node in model.graph if node.op_type.startswith("GroupNorm") and node.inputs[0] is not None]
    assert set(kept) == {{torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}[dtype]}


@pytest.mark.parametrize("way", ["kernels", "bodies", "inlined"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_graph_computes_what_the_network_does(network: nn.Module, dtype: torch.dtype, way: str) -> None:
    model = traced(network, dtype)
    if way == "inlined":
        inline_functions(model)
        assert not model.functions
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if way == "kernels":
        options.register_custom_ops_library(str(native_library()))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    atol, rtol = OP_TOLERANCE[str(dtype).removeprefix("torch.")]
    for n in (1, 3):
        x = torch.randn(n, CHANNELS, 5, 4, generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            expected = network(x).numpy()
        scale = np.abs(expected).max()  # the sums grow from norm to norm
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0] / scale, expected / scale, atol=atol, rtol=rtol)


class Unusual(nn.Module):
    """Forms that must stay as they are: two uses of a norm, a modulation by pixel, a norm over two axes, squares of another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.group, self.wide = nn.GroupNorm(2, CHANNELS), nn.LayerNorm((5, 4))
        self.map = nn.Parameter(torch.randn(CHANNELS, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.group(x)
        y = y * torch.sigmoid(y) + y
        z = functional.silu(self.group(y) * (1 + self.map) + self.map)
        w = self.wide(z)
        return z * torch.rsqrt(w.pow(2).mean(-1, keepdim=True) + 1e-3) * torch.ones(4)


def test_other_forms_stay_as_they_are() -> None:
    torch.manual_seed(0)
    network = Unusual().eval()
    model = traced(network, torch.float32)
    assert norms_in(model) == {"GroupNorm": 2, "LayerNormalization": 1}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(3, CHANNELS, 5, 4)
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], network(x).numpy(), atol=2e-5, rtol=1e-5)
