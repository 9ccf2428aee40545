"""The function bodies of ``scm`` operators in a finished graph: attached, so that it runs without the library, or put in place of the nodes."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from onnx import FunctionProto
from onnxscript import ir, optimizer, rewriter
from onnxscript.rewriter import MatchResult
from onnxscript.rewriter._matcher import SimplePatternMatcher

from scm_export.ops import OPERATORS
from scm_runtime.bundle.manifest import CHANNELS_FIRST_DOMAIN, CHANNELS_LAST_DOMAIN, OPS_DOMAIN, OPS_VERSION
from scm_runtime.errors import ExportError

INLINE_BELOW = 1024  # bytes; smaller tensors stay in their graphs, larger ones lie in the weights file


def attach_functions(model: ir.Model) -> None:
    """Give a model the bodies of the operators it uses. Optimising it afterwards would inline them.

    Raises:
        ExportError: the nodes of one operator would need different bodies.
    """
    nodes: dict[str, list[ir.Node]] = defaultdict(list)
    for node in model.graph.all_nodes():
        if node.domain in (OPS_DOMAIN, CHANNELS_LAST_DOMAIN, CHANNELS_FIRST_DOMAIN):
            nodes[node.op_type].append(node)
    for name, group in nodes.items():
        function = ir.serde.deserialize_function(_body(name, group, model.graph.opset_imports[""]))
        model.functions[function.identifier()] = function
        model.graph.opset_imports[function.domain] = OPS_VERSION


def inline_functions(model: ir.Model) -> None:
    """Put the bodies in place of the nodes, in a model that :func:`attach_functions` has gone over: standard ONNX is left."""
    optimize(model)


def optimize(model: ir.Model) -> None:
    """Fold constants and remove what nobody reads; the weights stay as they are stored. Inlines functions."""
    # Without the rules x + 0 = x and the like: they take any constant below 1e-8 for 0, and with it an epsilon out of a denominator.
    rules = tuple(_fast(rule) for rule in rewriter._DEFAULT_REWRITE_RULES if rule not in rewriter._no_op.rules)
    with patch.object(rewriter, "_DEFAULT_REWRITE_RULES", rules):  # optimize_ir has no argument for them
        optimizer.optimize_ir(model, should_fold=_only_small)


class _OperatorFirst(SimplePatternMatcher):
    """Matches a pattern of several output nodes as onnxscript does, but looks at the operator of the node before it lists all nodes of the graph."""

    def match(self, model: ir.Model, graph_or_function: Any, node: ir.Node, **options: Any) -> MatchResult:
        if node.op_identifier() != self.pattern.output_nodes[0].op_identifier():
            return MatchResult().fail("another operator")
        return super().match(model, graph_or_function, node, **options)


def _fast(rule: rewriter.RewriteRule) -> rewriter.RewriteRule:
    """The same rule. With several output nodes onnxscript takes quadratic time to match it: a tenth of the time of an export."""
    pattern = rule._target_pattern
    if pattern.has_single_output_node or pattern.output_nodes[0].op_identifier() is None:
        return rule
    fast = copy.copy(rule)
    fast._matcher = _OperatorFirst(pattern)
    return fast


def _body(name: str, nodes: Sequence[ir.Node], opset: int) -> FunctionProto:
    # All nodes have the optional output if it is read at one: ONNX Runtime inlines no body with more outputs than its node has.
    outputs = 2 if any(value.uses() or value.is_graph_output() for node in nodes for value in node.outputs[1:]) else 1
    for node in nodes:
        node.resize_outputs(outputs)
        for value in node.outputs[1:]:
            value.name = value.name or f"{node.outputs[0].name}_activated"
    shapes = [node.inputs[0].shape if node.inputs[0] is not None else None for node in nodes]
    bodies = [OPERATORS[name].function(opset, shape.rank(), outputs) for shape in shapes if shape is not None]
    if len(bodies) < len(nodes) or any(body != bodies[0] for body in bodies):
        raise ExportError(f"the first inputs of all {name} nodes in a graph must have one known rank, got the shapes {', '.join(map(str, shapes))}")
    return bodies[0]


def _only_small(node: ir.Node) -> bool | None:
    """Keep the weights as they are stored: a constant folded out of one would be a second copy, perhaps in another dtype."""
    constants = (value.const_value for value in node.inputs if value is not None and value.const_value is not None)
    return False if any(constant.nbytes >= INLINE_BELOW for constant in constants) else None
