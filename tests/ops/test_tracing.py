"""Operators in exported graphs: as nodes with function bodies, as function bodies run by plain ONNX Runtime, and disabled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import ModelProto
from onnxscript import ir
from torch import Tensor, nn

from scm_export import cli, ops
from scm_export.checkpoints import load_checkpoint
from scm_export.errors import ExportError
from scm_export.families import build_model
from scm_export.graphs.trace import trace_step
from scm_export.model import ImageDecoder, Model
from scm_export.ops import OPERATORS, Operator, operators_as_nodes
from scm_export.parametrisation import Step
from scm_runtime import Generator
from scm_runtime.bundle.manifest import OPS_DOMAIN, OPS_VERSION, read_manifest
from scm_runtime.common.load_onnxruntime import load_onnxruntime

onnxruntime = load_onnxruntime()

USED = {
    *("scm::PixelNorm", "scm::MPSiLU", "scm::MPSum", "scm::MPCat", "scm::CosineAttention", "scm::ConsistencyStep"),
    *("scm.channels_last::Conv3x3", "scm.channels_last::MatMul"),
    *("scm.fused::NormModulateSiLU", "scm.fused::Conv3x3MPSum", "scm.fused::MatMulMPSum"),
}
GRAPHS = {
    "noise.onnx": {"scm::PhiloxNormal"},
    "step.fp32.onnx": USED,
    "decode.fp32.onnx": {"scm::ToImage"},
    "sample-2.fp32.onnx": {"scm::PhiloxNormal", *USED, "scm::ToImage"},
}


def of_a_network(function: Callable[[Tensor], Tensor]) -> ModelProto:
    """Return the traced step of a network without weights that computes ``function(x)``, with x ``[N, 3, 4, 5]``."""

    class Network(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return function(x)

    model = Model("test", Step(Network(), 0.5), (3, 4, 5), sigma_data=0.5, initial_scale=0.5, times={1: (1.5, 0.0)}, decoder=ImageDecoder(1.0, 0.0))
    return ir.to_proto(trace_step(model, 20))


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(3, 3, 4, 5, generator=generator),
        "t": torch.tensor([0.3, 1.1, 1.5]),
        "t_next": torch.tensor([0.0, 0.3, 1.1]),
        "noise": torch.randn(3, 3, 4, 5, generator=generator),
    }


def run(model: ModelProto | Path, **values: Tensor) -> NDArray[Any]:
    """Run in plain ONNX Runtime, without the kernel library."""
    session = onnxruntime.InferenceSession(model if isinstance(model, Path) else model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {name: value.numpy() for name, value in values.items()})[0])


def operator_of(node: onnx.NodeProto) -> Operator:
    return OPERATORS[f"{node.domain}::{node.op_type}"]


def scm_nodes(model: ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain.startswith(OPS_DOMAIN)]


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_contains_operators_with_all_attributes_and_their_function_bodies(tiny_bundle: Path, name: str) -> None:
    model = onnx.load(tiny_bundle / name, load_external_data=False)
    nodes = scm_nodes(model)
    assert {operator_of(node).identifier for node in nodes} == GRAPHS[name]
    called = {operator.identifier for used in GRAPHS[name] for operator in OPERATORS[used].calls}
    assert sorted(f"{function.domain}::{function.name}" for function in model.functions) == sorted(GRAPHS[name] | called)
    domains = {used.partition("::")[0] for used in GRAPHS[name]}
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20} | dict.fromkeys(domains, OPS_VERSION)
    for node in nodes:
        operator = operator_of(node)
        assert {attribute.name for attribute in node.attribute} == {*operator.attributes, *operator.sizes}
        # Networks of this family use both outputs of every norm and concatenation, and one output of every sum.
        assert len(node.output) == (2 if node.op_type in ("PixelNorm", "MPCat") else 1)
    if name in ("noise.onnx", "decode.fp32.onnx"):
        assert list(model.graph.node) == nodes
    assert read_manifest(tiny_bundle).ops == {OPS_DOMAIN: OPS_VERSION}


def test_the_traced_step_matches_pytorch_in_plain_onnxruntime(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    model = build_model(load_checkpoint(tiny_checkpoint))
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 3, 8, 8, generator=generator)
    t, t_next, labels = torch.tensor([0.3, 1.1, 1.5]), torch.tensor([0.0, 0.3, 1.1]), torch.tensor([0, 3, 1])
    expected = model.step(x, t, t_next, noise, {"class_labels": labels})
    found = run(tiny_bundle / "step.fp32.onnx", x=x, t=t, t_next=t_next, noise=noise, class_labels=labels)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5, rtol=1e-5)


def test_without_custom_ops_the_same_samples_come_from_standard_onnx(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain.scm"
    result = CliRunner().invoke(cli.main, [str(tiny_checkpoint), "-o", str(out), "--no-custom-ops"])
    assert result.exit_code == 0, result.output
    assert read_manifest(out).ops == {}
    for path in out.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        assert not model.functions
        assert {node.domain for node in model.graph.node} == {""}
        assert [entry.domain for entry in model.opset_import] == [""]
    sizes = [read_manifest(bundle).files["weights.onnx.data"].size for bundle in (out, tiny_bundle)]
    assert sizes[0] == sizes[1]  # no constants were stored in the weights file
    with Generator(out) as plain, Generator(tiny_bundle) as usual:
        found, expected = (generate([0, 1, 2, 3], seed=0, output_type="latent").array for generate in (plain, usual))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_step_can_be_traced_through_the_operators(small_checkpoint: Path) -> None:
    model = build_model(load_checkpoint(small_checkpoint))
    plain = ir.to_proto(trace_step(model, 20, operators=False))
    assert not plain.functions
    assert not scm_nodes(plain)


def test_functions_compute_outside_of_a_trace() -> None:
    def fail() -> None:
        with operators_as_nodes():
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert ops.mp_silu(torch.ones(1)).item() == pytest.approx(0.7311 / 0.596, rel=1e-3)


def test_an_unused_output_is_omitted() -> None:
    model = of_a_network(lambda x: ops.mp_sum_silu(x, x * 2, t=0.3)[0])
    assert [len(node.output) for node in scm_nodes(model)] == [1, 1]
    assert np.isfinite(run(model, **inputs())).all()


def test_an_output_used_by_one_node_is_kept_in_all_nodes() -> None:
    def function(x: Tensor) -> Tensor:
        return ops.mp_sum_silu(ops.mp_sum(x, x * 2, t=0.3), x, t=0.5)[1]

    model = of_a_network(function)
    assert [len(node.output) for node in scm_nodes(model) if node.op_type == "MPSum"] == [2, 2]
    x, t, t_next, noise = inputs().values()
    expected = ops.consistency_step(x, function(x / 0.5), noise, t, t_next, 0.5)
    np.testing.assert_allclose(run(model, **inputs()), expected.numpy(), atol=1e-5)


def test_an_operator_in_another_ones_body_has_the_outputs_of_the_nodes_in_the_graph() -> None:
    weight = torch.linspace(-0.2, 0.2, 5 * 5 * 9).reshape(5, 5, 3, 3)

    def function(x: Tensor) -> Tensor:
        y, activated = ops.mp_sum_silu(x, x * 2, t=0.3)
        return ops.conv3x3_mp_sum(activated, weight, y, t=0.3, clip=0.5)

    model = of_a_network(function)
    assert {function.name for function in model.functions} == {"Conv3x3MPSum", "Conv3x3", "MPSum", "ConsistencyStep"}
    x, t, t_next, noise = inputs().values()
    expected = ops.consistency_step(x, function(x / 0.5), noise, t, t_next, 0.5)
    np.testing.assert_allclose(run(model, **inputs()), expected.numpy(), atol=1e-5)


def test_one_operator_with_inputs_of_two_ranks_is_rejected() -> None:
    def function(x: Tensor) -> Tensor:
        scale = x.mean((1, 2))
        return ops.modulate_silu(ops.modulate_silu(x, scale).flatten(1, 2), scale).reshape(x.shape)

    with pytest.raises(ExportError, match=r"all ModulateSiLU nodes in a graph must have one known rank, got the shapes \[\w+,3,4,5\], \[\w+,12,5\]"):
        of_a_network(function)
