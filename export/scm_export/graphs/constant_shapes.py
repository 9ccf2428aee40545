"""Shapes that a traced graph computes at run time although only the batch size, or one other size, is unknown: replaced by constants.

torch.onnx takes the target of many reshapes from the operator Shape. On a GPU, ONNX Runtime copies such shapes to the host, or refuses to capture the graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnxscript import ir

Size = int | str | None
"""A number (-1 in a Reshape is inferred), the name of a dynamic size, or None if nothing is known."""

MAX_DEPTH = 8  # nodes from a Shape to the Reshape that uses it


def use_constant_shapes(model: ir.Model) -> None:
    """Replace the computed target of each Reshape by a constant where that gives the same shape for every batch."""
    for node in list(model.graph):
        if node.domain or node.op_type != "Reshape" or node.inputs[0] is None or node.inputs[1] is None or _is_constant(node.inputs[1]):
            continue
        sizes = _sizes(node.inputs[1])
        target = None if sizes is None else _target(sizes, node.inputs[0].shape)
        if target is None:
            continue
        name = f"{node.outputs[0].name}/shape"
        shape = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(target)]), const_value=ir.tensor(np.array(target), name=name))
        model.graph.register_initializer(shape)
        node.replace_input_with(1, shape)
        node.attributes.pop("allowzero", None)


def _target(sizes: Sequence[Size], given: ir.Shape | None) -> list[int] | None:
    """The sizes as a constant target: 0 for a dynamic size that the input has on the same axis, -1 for one other. None if that does not suffice."""
    target = []
    for axis, size in enumerate(sizes):
        if isinstance(size, int):
            target.append(size)
        elif given is not None and axis < len(given) and size is not None and _size(given[axis]) == size:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 and 0 not in sizes else None


def _sizes(value: ir.Value | None, depth: int = MAX_DEPTH) -> list[Size] | None:
    """Elements of a vector of sizes, as far as they are known when the graph is exported; None if its length is not known."""
    if value is None:
        return None
    constant = _constant(value)
    if constant is not None:
        return list(constant)
    node = value.producer()
    if node is None or node.domain or depth == 0:
        return None
    if node.op_type == "Shape":
        shape, attributes = node.inputs[0].shape if node.inputs[0] is not None else None, node.attributes
        if shape is None:
            return None
        end = attributes["end"].as_int() if "end" in attributes else None
        return [_size(size) for size in shape][attributes["start"].as_int() if "start" in attributes else 0 : end]
    if node.op_type == "Concat":
        parts = [_sizes(part, depth - 1) for part in node.inputs]
        return None if any(part is None for part in parts) else [size for part in parts if part is not None for size in part]
    if node.op_type == "Slice":
        sizes, bounds = _sizes(node.inputs[0], depth - 1), [_constant(bound) for bound in node.inputs[1:]]
        if sizes is None or len(bounds) < 2 or any(bound is None or len(bound) != 1 for bound in bounds):
            return None
        start, end, _axis, step = [bound[0] for bound in bounds if bound is not None] + [0, 1][len(bounds) - 2 :]
        return sizes[start:end] if step == 1 else None
    return None


def _size(size: int | ir.SymbolicDim) -> Size:
    return size if isinstance(size, int) else size.value


def _is_constant(value: ir.Value) -> bool:
    return _constant(value) is not None


def _constant(value: ir.Value | None) -> list[int] | None:
    """Elements of a constant vector of int64; None for other values."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or tensor.dtype != ir.DataType.INT64 or len(tensor.shape) != 1:
        return None
    return [int(element) for element in tensor.numpy()]
