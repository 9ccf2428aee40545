"""Normalizations of traced networks become one operator each, with the casts, the modulation and the SiLU around them, and compute what PyTorch does."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers.models.normalization import RMSNorm as RMSNormOfDiffusers
from numpy.typing import NDArray
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
    """As networks often define it: computed in the type of the network."""

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
        y: Tensor = tokens + self.rms(tokens)
        return y


def traced(network: nn.Module, dtype: torch.dtype) -> ir.Model:
    precision = Precision(network)
    precision.compute_dtype = dtype
    return trace_map("norms", precision, torch.randn(2, CHANNELS, 5, 4), "x", "y", opset=20)


class Float32Ends(nn.Module):
    """A network in another type, with inputs and outputs in float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x.to(self.dtype))
        return y.float()


def run(model: ir.Model, x: Tensor, *, native: bool) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if native:
        options.register_custom_ops_library(str(native_library()))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x.numpy()})[0])


def norms_in(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph if "Norm" in node.op_type)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Norms().eval()


@pytest.fixture(scope="module")
def graphs(network: nn.Module) -> dict[torch.dtype, ir.Model]:
    return {dtype: traced(copy.deepcopy(network), dtype) for dtype in (torch.float32, torch.float16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_become_one_operator_with_what_surrounds_them(graphs: dict[torch.dtype, ir.Model], dtype: torch.dtype) -> None:
    model = graphs[dtype]
    assert norms_in(model) == {"GroupNormSiLU": 1, "GroupNormModulateSiLU": 2, "GroupNorm": 2, "LayerNorm": 1, "LayerNormModulate": 1, "RMSNorm": 1}
    expected = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16}[dtype]
    assert {node.inputs[0].dtype for node in model.graph if node.op_type.startswith(("Group", "Layer")) and node.inputs[0] is not None} == {expected}


@pytest.mark.parametrize("way", ["kernels", "bodies", "inlined"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_graph_computes_what_the_network_does(network: nn.Module, graphs: dict[torch.dtype, ir.Model], dtype: torch.dtype, way: str) -> None:
    model = ir.from_proto(ir.to_proto(graphs[dtype]))
    if way == "inlined":
        inline_functions(model)
        assert not model.functions
    atol, rtol = OP_TOLERANCE[str(dtype).removeprefix("torch.")]
    for n in (1, 3):
        x = torch.randn(n, CHANNELS, 5, 4, generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            expected = network(x).numpy()
        scale = np.abs(expected).max()  # the sums grow from norm to norm
        np.testing.assert_allclose(run(model, x, native=way == "kernels") / scale, expected / scale, atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_diffusers_rms_norm_becomes_one_operator(dtype: torch.dtype) -> None:
    """In half precision it computes in float32, and multiplies by its weight in half precision."""
    norm = RMSNormOfDiffusers(CHANNELS, eps=1e-6)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    norm = norm.to(dtype).eval()
    model = trace_map("norm", Float32Ends(norm, dtype), torch.randn(2, 5, CHANNELS), "x", "y", opset=20)
    assert norms_in(model) == {"RMSNorm": 1}
    assert {node.op_type for node in model.graph} <= {"RMSNorm", "Cast"}
    x = torch.randn(3, 5, CHANNELS, generator=torch.Generator().manual_seed(1))
    atol, rtol = OP_TOLERANCE[str(dtype).removeprefix("torch.")]
    for native in (True, False):
        np.testing.assert_allclose(run(model, x, native=native), Float32Ends(norm, dtype)(x).detach().numpy(), atol=atol, rtol=rtol)


def test_a_group_norm_of_another_type_is_computed_in_float32() -> None:
    norm = nn.GroupNorm(2, CHANNELS).double().eval()
    model = trace_map("norm", Float32Ends(norm, torch.float64), torch.randn(2, CHANNELS, 5), "x", "y", opset=20)
    assert norms_in(model) == {"GroupNorm": 1}
    x = torch.randn(3, CHANNELS, 5)
    for native in (True, False):
        np.testing.assert_allclose(run(model, x, native=native), Float32Ends(norm, torch.float64)(x).detach().numpy(), atol=1e-5, rtol=1e-5)


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
    x = torch.randn(3, CHANNELS, 5, 4)
    with torch.no_grad():
        np.testing.assert_allclose(run(model, x, native=False), network(x).numpy(), atol=2e-5, rtol=1e-5)
