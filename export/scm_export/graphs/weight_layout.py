"""Weights stored in the shape and order in which they are multiplied.

Otherwise each session that opens the graph would fold the Transpose of a weight into a copy of it in memory.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnxscript import ir

from scm_export.graphs.functions import INLINE_BELOW


def fold_weight_transposes(model: ir.Model) -> None:
    """Apply each Reshape and Transpose of a weight to the stored tensor, and remove the node. A Cast between the two stays.

    PyTorch's ``linear``, for example, multiplies by the transpose of its stored weight. The new tensors are views of the old ones.
    """
    for node in list(model.graph):
        if node.op_type not in ("Reshape", "Transpose") or node.domain:
            continue
        source, output = node.inputs[0], node.outputs[0]
        weight = _weight(source)
        if source is None or weight is None or weight.const_value is None or output.is_graph_output():
            continue
        array = _apply(node, weight.const_value.numpy())
        if array is None:
            continue
        weight.const_value = ir.Tensor(array, weight.const_value.dtype, name=weight.name)
        weight.shape = source.shape = ir.Shape(array.shape)
        output.replace_all_uses_with(source)
        model.graph.remove(node, safe=True)


def _weight(value: ir.Value | None) -> ir.Value | None:
    """The large initializer that a value is, or is the Cast of; None if there is none, or if it is used elsewhere too."""
    if value is None or len(value.uses()) != 1:
        return None
    producer = value.producer()
    if producer is not None:
        return _weight(producer.inputs[0]) if producer.op_type == "Cast" and not producer.domain else None
    return value if value.is_initializer() and value.const_value is not None and value.const_value.nbytes >= INLINE_BELOW else None


def _apply(node: ir.Node, array: NDArray[np.generic]) -> NDArray[np.generic] | None:
    if node.op_type == "Transpose":
        order = node.attributes.get("perm")
        return array.transpose(None if order is None else list(order.as_ints()))
    shape = node.outputs[0].shape
    return array.reshape(shape.numpy()) if shape is not None and shape.is_static() else None
