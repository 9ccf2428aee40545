"""Emulation of bfloat16 graphs on the CPU, where ONNX Runtime has no bfloat16 kernels for MatMul and Conv.

The graph is run in float32, and every result is rounded to bfloat16. That is what bfloat16 kernels compute: they accumulate in float32. Values keep the type
float32 with bfloat16 contents, so that nothing else in the graph changes.
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

# Operators that move values or choose among them: their results need no rounding.
LOSSLESS_OPS = {
    *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile", "Transpose", "Concat", "Split", "Slice"),
    *("Gather", "GatherElements", "GatherND", "Where", "Max", "Min", "MaxPool", "Relu", "Neg", "Abs"),
}


def emulate_bf16(model: ModelProto) -> ModelProto:
    """Return a float32 graph that computes what a graph with bfloat16 values computes, up to the order of summation.

    Args:
        model: its inputs and outputs must not be bfloat16. Weights may be external data; the result refers to the same file.

    Raises:
        ExportError: the type of a value cannot be inferred, or a node has subgraphs.
    """
    model = shape_inference.infer_shapes(inliner.inline_local_functions(model))
    bfloat16_values = _bfloat16_values(model)
    nodes: list[NodeProto] = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            stored = f"{tensor.name}/stored"
            nodes.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
            tensor.name = stored
    for node in model.graph.node:
        outputs = [] if node.op_type in LOSSLESS_OPS else [name for name in node.output if name in bfloat16_values]
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
def emulated_graph(path: Path) -> Iterator[Path]:
    """Context with the path of the emulation of the graph at ``path``, a temporary file beside it that refers to the same weights file."""
    emulated = beside(path, "emulated")
    try:
        model = onnx.load(path, load_external_data=False)
        emulated.write_bytes(emulate_bf16(model).SerializeToString())
        yield emulated
    finally:
        emulated.unlink(missing_ok=True)


def _bfloat16_values(model: ModelProto) -> set[str]:
    """Names of all bfloat16 values of a graph."""
    graph, opsets = model.graph, {entry.domain: entry.version for entry in model.opset_import}
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if any(attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute):
            raise ExportError(f"the bfloat16 graph {graph.name!r} cannot be verified here: its node {node.name!r} ({node.op_type}) has subgraphs")
        for index, name in enumerate(node.output):
            if name and not types.get(name):
                types[name] = _type(node, index, types, opsets.get(node.domain, 1))
                if not types[name]:
                    raise ExportError(f"the bfloat16 graph {graph.name!r} cannot be verified here: no type is known for {name!r} of its {node.op_type}")
    return {name for name, dtype in types.items() if dtype == TensorProto.BFLOAT16}


def _type(node: NodeProto, index: int, types: Mapping[str, int], version: int) -> int:
    """Output type from the operator's schema, for operators without type inference in onnx (GroupNormalization); 0 if the schema does not determine it."""
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError:
        return 0
    variable = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
    return next((types.get(name, 0) for name, formal in zip(node.input, schema.inputs, strict=False) if name and formal.type_str == variable), 0)
