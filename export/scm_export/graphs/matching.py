"""Small questions about the nodes and values of a traced graph, for the passes that recognize groups of nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnxscript import ir

from scm_export.ops.operator import Operator
from scm_runtime.bundle.manifest import OPS_VERSION


def is_node(node: ir.Node, op_type: str) -> bool:
    """Return True for a node of a standard operator."""
    return node.op_type == op_type and not node.domain


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the node of a standard operator that is the only use of a value; None if there is another use, or none."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() and is_node(uses[0].node, op_type) else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """Return the other input of a node with two inputs, one of which is ``value``."""
    first, second = node.inputs
    return second if first is value else first


def constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """Return the elements of a constant; None for other values."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def same_shape(shape: ir.Shape | None, expected: Sequence[Any]) -> bool:
    """Return True if a shape is known to be the expected one. Dynamic sizes are the same if they have the same name."""
    if shape is None or len(shape) != len(expected):
        return False
    return all(same_size(one, other) for one, other in zip(shape, expected, strict=True))


def same_size(one: int | str | ir.SymbolicDim, other: int | str | ir.SymbolicDim) -> bool:
    """Return True if two sizes are known to be the same. Two dynamic sizes without a name compare equal, but need not be."""
    return _size(one) is not None and _size(one) == _size(other)


def silu_of(x: ir.Value) -> ir.Node | None:
    """Return the node that computes ``x * sigmoid(x)``, if that is the only use of a value."""
    users = {use.node for use in x.uses()}
    sigmoid = next((node for node in users if is_node(node, "Sigmoid")), None)
    product = None if sigmoid is None else only_user(sigmoid.outputs[0], "Mul")
    if x.is_graph_output() or sigmoid is None or product is None or users != {sigmoid, product}:
        return None
    return product if set(product.inputs) == {x, sigmoid.outputs[0]} else None


def replace_output(graph: ir.Graph, last: ir.Node, operator: Operator, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any]) -> None:
    """Replace the output of ``last``, a node of the graph, by that of a new node of an operator of ``scm``.

    The nodes between are unused then, and removed with all others that are unused.
    """
    shapes = [[size if isinstance(size, int) else 0 for size in value.shape or ()] for value in inputs if value is not None]
    given = {**attributes, **operator.size_attributes(shapes)}
    node = ir.Node(operator.domain, operator.name, inputs, ir.convenience.convert_attributes(given), version=OPS_VERSION)
    old = last.outputs[0]
    node.outputs[0].type, node.outputs[0].shape = old.type, old.shape
    graph.insert_before(last, node)
    old.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
    name, old.name = old.name, f"{old.name}/replaced"
    node.outputs[0].name, node.name = name, f"node_{name}"
    graph.remove(last, safe=True)


def _size(size: int | str | ir.SymbolicDim) -> int | str | None:
    return size.value if isinstance(size, ir.SymbolicDim) else size
