"""``sample-K``: noise, K steps and decode composed into one graph, for hosts that want a single call.

Inputs are seeds, int64 ``[N]``, and the conditioning; the output is the image or the latent. The copies of a part share its constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from scm_export.graphs.build import BATCH
from scm_export.model import Model


def compose_sample(model: Model, steps: int, noise: ModelProto, step: ModelProto, decode: ModelProto) -> ModelProto:
    """Compose the sampler for one step count from the graphs of its parts, whose weights may be external data.

    Types and shapes of intermediate values are copied too: with the native library registered, ONNX Runtime does not look into function bodies, and its
    own inference stops at dimensions without a name.
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
    functions = {(function.domain, function.name): function for part in (noise, step, decode) for function in part.functions}
    return helper.make_model(graph, opset_imports=list(imports.values()), ir_version=step.ir_version, functions=list(functions.values()))


def _instantiate(part: GraphProto, prefix: str, inputs: Mapping[str, str], nodes: list[NodeProto], values: list[ValueInfoProto]) -> str:
    """Append a copy of a graph's nodes and value types to ``nodes`` and ``values``.

    Args:
        part: the graph to copy.
        prefix: prepended to the names of the copy's nodes and values.
        inputs: name of the outer value for each input of the graph.
        nodes: receives the nodes.
        values: receives the types and shapes.

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
    """Copy of an initializer, under a name that all copies of its graph share."""
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
