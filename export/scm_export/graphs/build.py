"""The graphs that are built node by node instead of traced: noise, decode and combine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnxscript import ir

from scm_export.graphs.functions import attach_functions
from scm_export.model import ImageDecoder, Latents
from scm_export.ops import Operator
from scm_export.ops.philox_normal import PHILOX_NORMAL
from scm_export.ops.to_image import TO_IMAGE
from scm_runtime.bundle.manifest import OPS_DOMAIN

BATCH = "batch"


def ir_version(opset: int) -> int:
    """Lowest IR version that supports an operator set, so that old versions of ONNX Runtime can read the graph."""
    return helper.find_min_ir_version_for([helper.make_opsetid("", opset)])


def build_noise(sample_shape: Sequence[int], opset: int) -> ir.Model:
    """Build the noise graph: seeds int64 ``[N]``, draw int64 ``[]``, scale float32 ``[]`` to normal noise, float32 ``[N, *sample_shape]``."""
    inputs = [_value("seeds", ir.DataType.INT64, [BATCH]), _value("draw", ir.DataType.INT64, []), _value("scale", ir.DataType.FLOAT, [])]
    attributes = [ir.AttrInt64s("shape", sample_shape)]
    return _single_node("noise", PHILOX_NORMAL, inputs, attributes, _value("noise", ir.DataType.FLOAT, [BATCH, *sample_shape]), opset)


def build_decode(sample_shape: Sequence[int], decoder: ImageDecoder | Latents, opset: int) -> ir.Model:
    """Build the decode graph: x float32 ``[N, C, H, W]`` to uint8 ``[N, H, W, C]``. If samples are latents, it returns x."""
    x = _value("x", ir.DataType.FLOAT, [BATCH, *sample_shape])
    if isinstance(decoder, Latents):
        output = _value("latent", ir.DataType.FLOAT, [BATCH, *sample_shape])
        return _model("decode", [x], ir.Node("", "Identity", [x], outputs=[output], name="decode"), opset)
    channels, height, width = sample_shape
    attributes = [ir.AttrFloat32("scale", decoder.scale), ir.AttrFloat32("offset", decoder.offset)]
    return _single_node("decode", TO_IMAGE, [x], attributes, _value("image", ir.DataType.UINT8, [BATCH, height, width, channels]), opset)


def build_combine(sample_shape: Sequence[int], opset: int) -> ir.Model:
    """Build the combine graph: weights[:, 0] base + weights[:, 1] x + weights[:, 2] result.

    x, base and result are float32 ``[N, *sample_shape]``, weights float32 ``[N, 3]``.
    """
    state: list[str | int | None] = [BATCH, *sample_shape]
    summands = ("base", "x", "result")
    axes = numpy_helper.from_array(np.arange(2, len(state), dtype=np.int64), "axes")
    nodes = [helper.make_node("Split", ["weights"], [f"{name}_column" for name in summands], axis=1, num_outputs=3)]
    for name in summands:
        nodes.append(helper.make_node("Unsqueeze", [f"{name}_column", "axes"], [f"{name}_weight"]))
        nodes.append(helper.make_node("Mul", [name, f"{name}_weight"], [f"{name}_part"]))
    nodes.append(helper.make_node("Add", ["base_part", "x_part"], ["states"]))
    nodes.append(helper.make_node("Add", ["states", "result_part"], ["combined"]))
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, 3] if name == "weights" else state) for name in (*summands, "weights")]
    output = helper.make_tensor_value_info("combined", TensorProto.FLOAT, state)
    graph = helper.make_graph(nodes, "combine", inputs, [output], [axes])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version(opset)))


def _value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _single_node(name: str, operator: Operator, inputs: Sequence[ir.Value], attributes: Sequence[ir.Attr], output: ir.Value, opset: int) -> ir.Model:
    return _model(name, inputs, ir.Node(OPS_DOMAIN, operator.name, inputs, attributes, outputs=[output], name=name), opset)


def _model(name: str, inputs: Sequence[ir.Value], node: ir.Node, opset: int) -> ir.Model:
    graph = ir.Graph(inputs, node.outputs, nodes=[node], name=name, opset_imports={"": opset})
    model = ir.Model(graph, ir_version=ir_version(opset))
    attach_functions(model)
    return model
