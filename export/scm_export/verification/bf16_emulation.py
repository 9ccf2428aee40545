"""bfloat16 graphs where no bfloat16 kernels are: ONNX Runtime's CPU provider multiplies and convolves no bfloat16.

The same graph is run in float32 with every result rounded to bfloat16, which is what such kernels compute: they too accumulate in float32. A float32
that holds a bfloat16 stands for it everywhere, so that nothing else about the graph changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx.defs
from onnx import ModelProto, NodeProto, TensorProto, helper, inliner, shape_inference

from scm_export.errors import ExportError
from scm_runtime.common.files import beside

# They move numbers or choose among them: what was bfloat16 still is.
EXACT = {
    *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile", "Transpose", "Concat", "Split", "Slice"),
    *("Gather", "GatherElements", "GatherND", "Where", "Max", "Min", "MaxPool", "Relu", "Neg", "Abs"),
}


def emulate(model: ModelProto) -> ModelProto:
    """A graph in float32 that computes what a graph with bfloat16 inside computes, to the rounding of sums.

    Args:
        model: inputs and outputs of other types than bfloat16. Its weights may be external data, which the result refers to as well.

    Raises:
        ExportError: the type of a value cannot be inferred, or a node has graphs of its own.
    """
    model = shape_inference.infer_shapes(inliner.inline_local_functions(model))
    halves = _bfloat16_values(model)
    nodes: list[NodeProto] = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            stored = f"{tensor.name}/stored"
            nodes.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
            tensor.name = stored
    for node in model.graph.node:
        outputs = [] if node.op_type in EXACT else [name for name in node.output if name in halves]
        exact = {name: f"{name}/exact" for name in outputs}
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.output[:] = [exact.get(name, name) for name in node.output]
        nodes.append(copy)
        for name in outputs:
            nodes.append(helper.make_node("Cast", [exact[name]], [f"{name}/rounded"], to=TensorProto.BFLOAT16))
            nodes.append(helper.make_node("Cast", [f"{name}/rounded"], [name], to=TensorProto.FLOAT))
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    return model


@contextmanager
def emulated(path: Path) -> Iterator[Path]:
    """Path of a graph like the one at ``path``, emulated where there is bfloat16 in it; gone after the block. Its weights are the same file's."""
    stand_in = beside(path, "emulated")
    try:
        model = onnx.load(path, load_external_data=False)
        stand_in.write_bytes(emulate(model).SerializeToString())
        yield stand_in
    finally:
        stand_in.unlink(missing_ok=True)


def _bfloat16_values(model: ModelProto) -> set[str]:
    graph, opsets = model.graph, {entry.domain: entry.version for entry in model.opset_import}
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if any(attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute):
            raise ExportError(f"the bfloat16 graph {graph.name!r} cannot be verified here: its node {node.name!r} ({node.op_type}) has graphs of its own")
        for index, name in enumerate(node.output):
            if name and not types.get(name):
                types[name] = _type(node, index, types, opsets.get(node.domain, 1))
                if not types[name]:
                    raise ExportError(f"the bfloat16 graph {graph.name!r} cannot be verified here: no type is known for {name!r} of its {node.op_type}")
    return {name for name, dtype in types.items() if dtype == TensorProto.BFLOAT16}


def _type(node: NodeProto, index: int, types: Mapping[str, int], version: int) -> int:
    """Type of an output by the operator's schema, for operators that onnx has no inference for (GroupNormalization); 0 where that says nothing."""
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError:
        return 0
    variable = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
    return next((types.get(name, 0) for name, formal in zip(node.input, schema.inputs, strict=False) if name and formal.type_str == variable), 0)
