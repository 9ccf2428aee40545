"""Quantization of linear layers to ONNX Runtime's ``MatMulNBits``: 8 or 4 bits per weight, with one scale for each block of 32."""

from __future__ import annotations

import importlib
import logging
from typing import Any
from unittest.mock import patch

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxscript import ir

from scm_export.graphs.functions import INLINE_BELOW
from scm_runtime.bundle.manifest import CHANNELS_LAST_DOMAIN
from scm_runtime.common.load_onnxruntime import load_onnxruntime

DOMAIN = "com.microsoft"
BLOCK_SIZE = 32


def quantize_linear_layers(model: ir.Model, bits: int) -> None:
    """Replace every MatMul by a stored float32 matrix with a MatMulNBits of ONNX Runtime's own quantizer, one layer at a time.

    Args:
        model: changed in place.
        bits: 4 or 8.
    """
    quantizer = _load_quantizer()
    stored: dict[ir.Value, list[ir.Value]] = {}
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" and node.domain in ("", CHANNELS_LAST_DOMAIN) else None
        if weight is None or not _is_large_matrix(weight):
            continue
        x, output = node.inputs[0], node.outputs[0]
        one = quantizer(_layer(weight), bits=bits, block_size=BLOCK_SIZE, is_symmetric=False)
        one.process()
        quantized = ir.serde.deserialize_model(one.model.model)
        (replacement,) = list(quantized.graph)
        if weight not in stored:
            stored[weight] = [_copied(model.graph, weight, value) for value in replacement.inputs[1:] if value is not None]
        new = ir.Node(DOMAIN, "MatMulNBits", [x, *stored[weight]], list(replacement.attributes.values()), num_outputs=1, name=node.name, version=1)
        new.outputs[0].type, new.outputs[0].shape = output.type, output.shape
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [new], [output], new.outputs)
    model.graph.opset_imports[DOMAIN] = 1
    passes: Any = ir.passes.common  # partly annotated
    for unused in (passes.RemoveUnusedNodesPass(), passes.RemoveUnusedFunctionsPass(), passes.RemoveUnusedOpsetsPass()):
        unused(model)


def _load_quantizer() -> Any:
    """ONNX Runtime's class, imported without its configuration of Python's logging, which would print every message of every package."""
    load_onnxruntime()
    with patch.object(logging, "basicConfig"):
        return importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer").MatMulNBitsQuantizer


def _is_large_matrix(weight: ir.Value) -> bool:
    tensor = weight.const_value
    return weight.is_initializer() and tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.nbytes >= INLINE_BELOW and len(tensor.shape) == 2


def _layer(weight: ir.Value) -> ModelProto:
    """A model of one MatMul by a weight."""
    assert weight.const_value is not None
    matrix = np.ascontiguousarray(weight.const_value.numpy())
    rows, columns = matrix.shape
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", rows])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", columns])]
    node = helper.make_node("MatMul", ["x", "weight"], ["y"], "layer")
    graph = helper.make_graph([node], "layer", inputs, outputs, [numpy_helper.from_array(matrix, "weight")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def _copied(graph: ir.Graph, weight: ir.Value, part: ir.Value) -> ir.Value:
    """Store a part of a quantized weight in a graph, under the name of the weight."""
    tensor = part.const_value
    assert tensor is not None
    name = f"{weight.name}/{(part.name or '').removeprefix('weight_')}"
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=ir.tensor(tensor.numpy(), tensor.dtype, name)
    )
    graph.register_initializer(value)
    return value
