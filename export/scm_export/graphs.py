"""Graphs that are built, not traced: noise, decode, combine, and the composition of a whole sampler into one graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnxscript import ir

from scm_export.functions import attach_functions
from scm_export.model import ImageDecoder, Latents, Model
from scm_export.ops import OPERATORS, Operator
from scm_runtime.bundle.manifest import OPS_DOMAIN

BATCH = "batch"


def ir_version(opset: int) -> int:
    """The oldest IR version that allows an operator set, so that the oldest ONNX Runtime can read the graph."""
    return helper.find_min_ir_version_for([helper.make_opsetid("", opset)])


def build_noise(sample_shape: Sequence[int], opset: int) -> ir.Model:
    """noise: seeds int64 ``[N]``, draw int64 ``[]``, scale float32 ``[]`` to normal noise, float32 ``[N, *sample_shape]``."""
    inputs = [_value("seeds", ir.DataType.INT64, [BATCH]), _value("draw", ir.DataType.INT64, []), _value("scale", ir.DataType.FLOAT, [])]
    attributes = [ir.AttrInt64s("shape", sample_shape)]
    return _single_node("noise", OPERATORS["PhiloxNormal"], inputs, attributes, _value("noise", ir.DataType.FLOAT, [BATCH, *sample_shape]), opset)


def build_decode(sample_shape: Sequence[int], decoder: ImageDecoder | Latents, opset: int) -> ir.Model:
    """decode: x float32 ``[N, C, H, W]`` to uint8 ``[N, H, W, C]``, or, where samples are latents, to itself."""
    x = _value("x", ir.DataType.FLOAT, [BATCH, *sample_shape])
    if isinstance(decoder, Latents):
        output = _value("latent", ir.DataType.FLOAT, [BATCH, *sample_shape])
        return _model("decode", [x], ir.Node("", "Identity", [x], outputs=[output], name="decode"), opset)
    channels, height, width = sample_shape
    attributes = [ir.AttrFloat32("scale", decoder.scale), ir.AttrFloat32("offset", decoder.offset)]
    return _single_node("decode", OPERATORS["ToImage"], [x], attributes, _value("image", ir.DataType.UINT8, [BATCH, height, width, channels]), opset)


def build_combine(sample_shape: Sequence[int], opset: int) -> ir.Model:
    """combine: x, base, result float32 ``[N, *sample_shape]``, weights float32 ``[N, 3]`` to weights[:, 0] base + weights[:, 1] x + weights[:, 2] result."""
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


# ----------------------------------------------------------------------------
# sample-K: noise, K steps and decode in one graph, for hosts that want a single
# call: seeds int64 [N], conditioning... -> image or latent. The parts share their constants.


def compose_sample(model: Model, steps: int, noise: ModelProto, step: ModelProto, decode: ModelProto) -> ModelProto:
    """Compose the sampler of one step count out of the graphs of its parts, whose weights may lie in external data.

    Types and shapes come along: with the native library registered ONNX Runtime does not look into function bodies, and what it infers by itself ends
    where a dimension has no name.
    """
    nodes: list[NodeProto] = []
    values: list[ValueInfoProto] = []
    seeds = helper.make_tensor_value_info("seeds", TensorProto.INT64, [BATCH])
    conditioning = {value.name: value for value in step.graph.input if value.name in {item.name for item in model.conditioning}}

    def constant(name: str, value: np.generic) -> str:
        nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value))))
        return name

    def draw(index: int, scale: float) -> str:
        prefix = f"noise{index}/"
        inputs = {"seeds": "seeds", "draw": constant(f"{prefix}draw", np.int64(index)), "scale": constant(f"{prefix}scale", np.float32(scale))}
        return _instantiate(noise.graph, prefix, inputs, nodes, values)

    nodes.append(helper.make_node("Shape", ["seeds"], ["batch_shape"]))
    x = draw(0, model.initial_scale)
    for k, pair in enumerate(pairwise(model.times[steps])):
        inputs = {"x": x, "noise": draw(k + 1, 1.0), **{name: name for name in conditioning}}
        for name, time in zip(("t", "t_next"), pair, strict=True):
            inputs[name] = f"step{k}/{name}s"
            nodes.append(helper.make_node("Expand", [constant(f"step{k}/{name}", np.float32(time)), "batch_shape"], [inputs[name]]))
        x = _instantiate(step.graph, f"step{k}/", inputs, nodes, values)
    output = onnx.ValueInfoProto()
    output.CopyFrom(decode.graph.output[0])
    nodes.append(helper.make_node("Identity", [_instantiate(decode.graph, "decode/", {"x": x}, nodes, values)], [output.name]))

    constants = [_constant(part.graph, tensor) for part in (noise, step, decode) for tensor in part.graph.initializer]
    graph = helper.make_graph(nodes, f"sample-{steps}", [seeds, *conditioning.values()], [output], constants, value_info=values)
    imports = {entry.domain: entry for part in (noise, step, decode) for entry in part.opset_import}
    functions = {function.name: function for part in (noise, step, decode) for function in part.functions}
    return helper.make_model(graph, opset_imports=list(imports.values()), ir_version=step.ir_version, functions=list(functions.values()))


def _instantiate(part: GraphProto, prefix: str, inputs: Mapping[str, str], nodes: list[NodeProto], values: list[ValueInfoProto]) -> str:
    """Append a copy of a graph's nodes and of what is known of their results, its inputs bound to outer values and its own values prefixed.

    Returns:
        The name of the output.
    """
    names = dict(inputs)
    names |= {name: prefix + name for name in _outputs(part.node)}
    results = {name for node in part.node for name in node.output}
    values.extend(_renamed_value(value, names) for value in (*part.value_info, *part.output) if value.name in results)
    names |= {tensor.name: _constant(part, tensor).name for tensor in part.initializer}
    nodes.extend(_renamed(node, prefix, names) for node in part.node)
    return names[part.output[0].name]


def _constant(part: GraphProto, tensor: TensorProto) -> TensorProto:
    """A constant of a part under a name that all copies of the part share."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = f"{part.name}/{tensor.name}"
    return copy


def _outputs(nodes: Iterable[NodeProto]) -> Iterable[str]:
    for node in nodes:
        yield from (name for name in node.output if name)
        for graph in _subgraphs(node):
            yield from (tensor.name for tensor in graph.initializer)
            yield from (value.name for value in graph.input)
            yield from _outputs(graph.node)


def _subgraphs(node: NodeProto) -> Iterable[GraphProto]:
    return (graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs) if graph.node)


def _renamed_value(value: ValueInfoProto, names: Mapping[str, str]) -> ValueInfoProto:
    copy = ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = names.get(value.name, value.name)
    return copy


def _renamed(node: NodeProto, prefix: str, names: Mapping[str, str]) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name = prefix + node.name
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    for graph in _subgraphs(copy):
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            value.name = names.get(value.name, value.name)
        inner = [_renamed(child, prefix, names) for child in graph.node]
        del graph.node[:]
        graph.node.extend(inner)
    return copy
