"""Graphs that are built, not traced: noise, decode, and the composition of a whole sampler into one graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxscript import ir

from scm_export.model import ImageDecoder, Model
from scm_export.ops.philox import LOW32, MULTIPLIERS, ROUNDS, WEYL

BATCH = "batch"
INLINE_BELOW = 1024  # bytes; smaller tensors stay in their graphs, larger ones lie in the weights file


def ir_version(opset: int) -> int:
    """The oldest IR version that allows an operator set, so that the oldest ONNX Runtime can read the graph."""
    return helper.find_min_ir_version_for([helper.make_opsetid("", opset)])


class _Builder:
    """Collects nodes and named constants of one graph."""

    def __init__(self, name: str) -> None:
        self.name, self.tape, self.constants = name, ir.tape.Tape(), dict[str, ir.Value]()

    def const(self, value: object, dtype: np.typing.DTypeLike) -> ir.Value:
        array = np.array(value, dtype)
        name = f"{self.name}.{array.dtype}.{'_'.join(map(str, array.ravel().tolist()))}.{array.ndim}"
        if name not in self.constants:
            self.constants[name] = self.tape.initializer(ir.tensor(array, name=name))
        return self.constants[name]

    def op(self, kind: str, *inputs: ir.Value, **attributes: int | Sequence[int]) -> ir.Value:
        return self.tape.op(kind, inputs, attributes)

    def model(self, inputs: Sequence[ir.Value], output: ir.Value, opset: int) -> ir.Model:
        graph = ir.Graph(inputs, [output], nodes=self.tape.nodes, initializers=tuple(self.constants.values()), name=self.name, opset_imports={"": opset})
        return ir.Model(graph, ir_version=ir_version(opset))


def _value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


# ----------------------------------------------------------------------------
# noise: seeds int64 [N], draw int64 [], scale float32 [] -> float32 [N, *sample].
# The same arithmetic as ops/philox.py; 32-bit words travel in int64, whose
# product wraps to the right 64 bits, and shifts need unsigned numbers.


def build_noise(sample_shape: Sequence[int], opset: int) -> ir.Model:
    """The graph of :func:`scm_export.ops.philox_normal`, times ``scale``."""
    b = _Builder("noise")
    seeds = _value("seeds", ir.DataType.INT64, [BATCH])
    draw = _value("draw", ir.DataType.INT64, [])
    scale = _value("scale", ir.DataType.FLOAT, [])

    def low(words: ir.Value) -> ir.Value:
        return b.op("BitwiseAnd", words, b.const(LOW32, np.int64))

    def high(words: ir.Value) -> ir.Value:
        shifted = b.op("BitShift", b.op("Cast", words, to=TensorProto.UINT64), b.const(32, np.uint64), direction="RIGHT")  # type: ignore[arg-type]  # the tape also takes strings
        return b.op("Cast", shifted, to=TensorProto.INT64)

    def xor(*words: ir.Value) -> ir.Value:
        result = words[0]
        for word in words[1:]:
            result = b.op("BitwiseXor", result, word)
        return result

    column = b.op("Unsqueeze", seeds, b.const([1], np.int64))
    key = (low(column), high(column))
    elements = b.op("Range", b.const(0, np.int64), b.const(math.prod(sample_shape), np.int64), b.const(1, np.int64))
    row = b.op("Unsqueeze", elements, b.const([0], np.int64))
    zero = b.const(0, np.int64)
    counter = (draw, zero, row, zero)
    for i in range(ROUNDS):
        round_key = [low(b.op("Add", word, b.const(i * weyl & LOW32, np.int64))) if i else word for word, weyl in zip(key, WEYL, strict=True)]
        product0 = b.op("Mul", counter[0], b.const(MULTIPLIERS[0], np.int64))
        product1 = b.op("Mul", counter[2], b.const(MULTIPLIERS[1], np.int64))
        counter = (
            xor(high(product1), counter[1], round_key[0]),
            low(product1),
            xor(high(product0), counter[3], round_key[1]),
            low(product0),
        )
    words = (b.op("Cast", word, to=TensorProto.FLOAT) for word in counter[:2])
    u, v = (
        b.op("Add", b.op("Mul", word, b.const(unit * 2.0**-32, np.float32)), b.const(unit * 2.0**-33, np.float32))
        for word, unit in zip(words, (1.0, 2 * math.pi), strict=True)
    )
    # In float64: vectorised float32 logarithms and sines differ in the last bit with an element's place in the batch.
    u, v = (b.op("Cast", value, to=TensorProto.DOUBLE) for value in (u, v))
    radius = b.op("Sqrt", b.op("Mul", b.op("Log", u), b.const(-2.0, np.float64)))
    normal = b.op("Mul", b.op("Cast", b.op("Mul", radius, b.op("Sin", v)), to=TensorProto.FLOAT), scale)
    noise = b.op("Reshape", normal, b.const([0, *sample_shape], np.int64))
    noise.name, noise.dtype, noise.shape = "noise", ir.DataType.FLOAT, ir.Shape([BATCH, *sample_shape])
    return b.model([seeds, draw, scale], noise, opset)


# ----------------------------------------------------------------------------
# decode: x -> uint8 [N, H, W, C].


def build_decode(sample_shape: Sequence[int], decoder: ImageDecoder, opset: int) -> ir.Model:
    """The graph of :func:`scm_export.ops.to_image`."""
    b = _Builder("decode")
    channels, height, width = sample_shape
    x = _value("x", ir.DataType.FLOAT, [BATCH, channels, height, width])
    level = b.op("Add", b.op("Mul", x, b.const(decoder.scale, np.float32)), b.const(decoder.offset, np.float32))
    level = b.op("Round", b.op("Clip", level, b.const(0, np.float32), b.const(255, np.float32)))
    image = b.op("Transpose", b.op("Cast", level, to=TensorProto.UINT8), perm=[0, 2, 3, 1])
    image.name, image.dtype, image.shape = "image", ir.DataType.UINT8, ir.Shape([BATCH, height, width, channels])
    return b.model([x], image, opset)


# ----------------------------------------------------------------------------
# sample-K: noise, K steps and decode in one graph, for hosts that want a single
# call: seeds int64 [N], conditioning... -> image. The parts share their constants.


def compose_sample(model: Model, steps: int, noise: ModelProto, step: ModelProto, decode: ModelProto) -> ModelProto:
    """Compose the sampler of one step count out of the graphs of its parts, whose weights may lie in external data."""
    nodes: list[NodeProto] = []
    seeds = helper.make_tensor_value_info("seeds", TensorProto.INT64, [BATCH])
    conditioning = {value.name: value for value in step.graph.input if value.name in {item.name for item in model.conditioning}}

    def constant(name: str, value: np.generic) -> str:
        nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value))))
        return name

    def draw(index: int, scale: float) -> str:
        prefix = f"noise{index}/"
        inputs = {"seeds": "seeds", "draw": constant(f"{prefix}draw", np.int64(index)), "scale": constant(f"{prefix}scale", np.float32(scale))}
        return _instantiate(noise.graph, prefix, inputs, nodes)

    nodes.append(helper.make_node("Shape", ["seeds"], ["batch_shape"]))
    x = draw(0, model.initial_scale)
    for k, pair in enumerate(pairwise(model.times[steps])):
        inputs = {"x": x, "noise": draw(k + 1, 1.0), **{name: name for name in conditioning}}
        for name, time in zip(("t", "t_next"), pair, strict=True):
            inputs[name] = f"step{k}/{name}s"
            nodes.append(helper.make_node("Expand", [constant(f"step{k}/{name}", np.float32(time)), "batch_shape"], [inputs[name]]))
        x = _instantiate(step.graph, f"step{k}/", inputs, nodes)
    nodes.append(helper.make_node("Identity", [_instantiate(decode.graph, "decode/", {"x": x}, nodes)], ["image"]))

    constants = {tensor.name: tensor for part in (noise, step, decode) for tensor in part.graph.initializer}
    if len(constants) < sum(len(part.graph.initializer) for part in (noise, step, decode)):
        raise ValueError("the parts of a sampler must not share names of initializers")
    image = onnx.ValueInfoProto()
    image.CopyFrom(decode.graph.output[0])
    image.name = "image"
    graph = helper.make_graph(nodes, f"sample-{steps}", [seeds, *conditioning.values()], [image], list(constants.values()))
    return helper.make_model(graph, opset_imports=step.opset_import, ir_version=step.ir_version, functions=step.functions)


def _instantiate(part: GraphProto, prefix: str, inputs: Mapping[str, str], nodes: list[NodeProto]) -> str:
    """Append a copy of a graph's nodes, its inputs bound to outer values and its own values prefixed; returns its output's name."""
    names = dict(inputs)
    names |= {name: prefix + name for name in _outputs(part.node)}
    nodes.extend(_renamed(node, prefix, names) for node in part.node)
    return names[part.output[0].name]


def _outputs(nodes: Iterable[NodeProto]) -> Iterable[str]:
    for node in nodes:
        yield from (name for name in node.output if name)
        for graph in _subgraphs(node):
            yield from (tensor.name for tensor in graph.initializer)
            yield from (value.name for value in graph.input)
            yield from _outputs(graph.node)


def _subgraphs(node: NodeProto) -> Iterable[GraphProto]:
    return (graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs) if graph.node)


def _renamed(node: NodeProto, prefix: str, names: Mapping[str, str]) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name = prefix + node.name
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    for graph in _subgraphs(copy):
        for value in (*graph.input, *graph.output, *graph.initializer):
            value.name = names.get(value.name, value.name)
        inner = [_renamed(child, prefix, names) for child in graph.node]
        del graph.node[:]
        graph.node.extend(inner)
    return copy
