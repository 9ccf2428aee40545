"""Exported EDM2 graphs: fused operators and the joined embedding layer change no bit on a CPU, and nothing computes a shape at run time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, inliner
from onnxscript import ir
from torch import Tensor, nn

from conftest import write_tiny_checkpoint
from scm_export.checkpoints import load_checkpoint
from scm_export.families import build_model
from scm_export.graphs.trace import trace_step
from scm_export.model import Model
from scm_export.networks.edm2 import UNet
from scm_export.networks.edm2_layers import MPConv
from scm_export.ops import OPERATORS
from scm_runtime.bundle.manifest import FUSED_DOMAIN
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.ort.open_session import COPYING_OPTIMIZERS
from scm_runtime.ort.options import LOW_MEMORY_ENTRIES, MATMUL_PRECISION
from support import native_library

onnxruntime = load_onnxruntime()

CONFIGS: dict[str, dict[str, Any]] = {
    "scm": {"attn_resolutions": (8,), "channels_per_head": 8},  # a scale of 1/sqrt(8), which is not a power of two
    "edm2": {"modulation": "scale", "time_embedding": "fourier"},
}


def model_of(config: str, folder: Path, **sizes: Any) -> Model:
    return build_model(load_checkpoint(write_tiny_checkpoint(folder / "tiny.pt", **CONFIGS[config], **sizes)))


def separate_embeddings(network: UNet) -> None:
    """Give each block of a folded network its own embedding layer back."""
    assert network.emb_blocks is not None
    for block, weight in zip(network.blocks, network.emb_blocks.weight.split([block.modulation_size for block in network.blocks]), strict=True):
        block.emb_linear = MPConv(weight.shape[1], weight.shape[0])
        block.emb_linear.weight, block.emb_linear.folded = nn.Parameter(weight, requires_grad=False), True
    network.emb_blocks = None


def exported_and_separate(config: str, dtype: str, folder: Path, **sizes: Any) -> tuple[ModelProto, ModelProto]:
    """The step as it is exported, and as it was before there were fused operators: one embedding product a block, and the operators one by one."""
    model = model_of(config, folder, **sizes)
    model.compute_in(dtype)
    exported = ir.to_proto(trace_step(model, 20))
    network = model.step.network
    assert isinstance(network, UNet)
    separate_embeddings(network)
    separate = ir.to_proto(trace_step(model, 20))
    fused = [(operator.domain, operator.name) for operator in OPERATORS.values() if operator.domain == FUSED_DOMAIN]
    return exported, inliner.inline_selected_functions(separate, fused)


@pytest.fixture(scope="module", params=CONFIGS)
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelProto, ModelProto]:
    return exported_and_separate(request.param, "fp32", tmp_path_factory.mktemp("fused"))


def run(model: ModelProto, n: int, *, library: bool, low_memory: bool, precision: str) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for name, value in (LOW_MEMORY_ENTRIES if low_memory else {}).items():
        options.add_session_config_entry(name, value)
    if library:
        options.add_session_config_entry(MATMUL_PRECISION, precision)
        options.register_custom_ops_library(str(native_library()))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(COPYING_OPTIMIZERS) if low_memory else []
    )
    generator = torch.Generator().manual_seed(n)
    x, noise = torch.randn(2, n, 3, 8, 8, generator=generator)
    t, labels = torch.linspace(0.2, 1.5, n), torch.arange(n) % 4
    values: dict[str, Tensor] = {"x": x, "t": t, "t_next": t / 2, "noise": noise, "class_labels": labels}
    result: NDArray[np.float32] = session.run(None, {name: value.numpy() for name, value in values.items()})[0]
    return result


@pytest.mark.parametrize(
    ("library", "low_memory", "precision"),
    [(False, False, ""), (False, True, ""), (True, False, "highest"), (True, False, "high"), (True, False, "medium")],
    ids=["bodies", "bodies, low memory", "highest", "high", "medium"],
)
def test_fused_operators_and_the_joined_embedding_layer_change_no_bit(
    graphs: tuple[ModelProto, ModelProto], library: bool, low_memory: bool, precision: str
) -> None:
    exported, separate = graphs
    for n in (1, 3, 8):
        found, expected = (run(model, n, library=library, low_memory=low_memory, precision=precision) for model in (exported, separate))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_they_change_no_bit_in_fp16_with_native_kernels(config: str, tmp_path: Path) -> None:
    """Without the library, ONNX Runtime drops roundings between the operators of a body, other ones in each graph. One level has every fused operator."""
    exported, separate = exported_and_separate(config, "fp16", tmp_path, channel_mult=(1,))
    for n in (1, 3):
        found, expected = (run(model, n, library=True, low_memory=False, precision="high") for model in (exported, separate))
        np.testing.assert_array_equal(found, expected)


def test_the_embedding_layers_are_one_product_and_every_block_is_fused(graphs: tuple[ModelProto, ModelProto]) -> None:
    exported, separate = (Counter(f"{node.domain}::{node.op_type}" for node in model.graph.node) for model in graphs)
    blocks = exported["scm.fused::Conv3x3MPSum"]
    assert blocks == 10
    assert exported["scm.fused::Conv3x3ModulateSiLU"] + exported["scm.fused::NormModulateSiLU"] == blocks
    assert exported["::Gemm"] == separate["::Gemm"] - blocks + 1
    assert not any(name.startswith(FUSED_DOMAIN) for name in separate)
    assert separate["scm.channels_last::Conv3x3"] == 2 * blocks + 2


def test_no_graph_computes_a_shape(graphs: tuple[ModelProto, ModelProto], tiny_bundle: Path) -> None:
    for model in (graphs[0], *(onnx.load(tiny_bundle / name, load_external_data=False) for name in ("step.fp32.onnx", "noise.onnx", "decode.fp32.onnx"))):
        operators = {node.op_type for node in inliner.inline_local_functions(model).graph.node}
        assert operators.isdisjoint({"Shape", "Size"}), model.graph.name
