"""Function bodies of the operators of ``scm_export.ops``: attached to a graph, so that it runs without the native library, or inlined."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from onnxscript import ir, optimizer, rewriter
from onnxscript.rewriter import MatchResult
from onnxscript.rewriter._matcher import SimplePatternMatcher

from scm_export.errors import ExportError
from scm_export.ops import OPERATORS, Operator
from scm_runtime.bundle.manifest import OPS_VERSION

INLINE_BELOW = 1024  # bytes; smaller tensors are stored in their graphs, larger ones in the weights file


def attach_functions(model: ir.Model) -> None:
    """Add the function bodies of the operators of ``scm_export.ops`` that a model uses. Do this last: :func:`optimize` inlines them.

    Raises:
        ExportError: nodes of one operator need different bodies.
    """
    uses: dict[str, list[_Use]] = defaultdict(list)
    for node in model.graph.all_nodes():
        if (identifier := f"{node.domain}::{node.op_type}") in OPERATORS:
            uses[identifier].append(_use(node))
    functions: list[ir.Function] = []
    for operator in sorted(OPERATORS.values(), key=lambda operator: not operator.calls):  # those that call others first
        if not (group := uses.pop(operator.identifier, [])):
            continue
        functions.append(_function(operator, group, model.graph.opset_imports[""]))
        for node in functions[-1]:
            if (called := f"{node.domain}::{node.op_type}") in OPERATORS:
                uses[called].append(_Use(node, group[0].rank, f"of {operator.name}"))
    for function in reversed(functions):
        model.functions[function.identifier()] = function
        model.graph.opset_imports[function.domain] = OPS_VERSION


def inline_functions(model: ir.Model) -> None:
    """Replace ``scm`` nodes by their function bodies, added by :func:`attach_functions`. The result is standard ONNX."""
    optimize(model)


def optimize(model: ir.Model) -> None:
    """Inline functions, fold small constants and remove unused nodes. Weights stay as they are stored."""
    # Rules such as x + 0 = x are left out: they take any constant below 1e-8 for 0, and so would remove an epsilon from a denominator.
    rules = tuple(_with_fast_matcher(rule) for rule in rewriter._DEFAULT_REWRITE_RULES if rule not in rewriter._no_op.rules)
    with patch.object(rewriter, "_DEFAULT_REWRITE_RULES", rules):  # optimize_ir has no parameter for the rules
        optimizer.optimize_ir(model, should_fold=_only_small)


class _OperatorFirstMatcher(SimplePatternMatcher):
    """onnxscript's matcher for patterns with several output nodes, except that it compares the operator before it lists all nodes of the graph."""

    def match(self, model: ir.Model, graph_or_function: Any, node: ir.Node, **options: Any) -> MatchResult:
        if node.op_identifier() != self.pattern.output_nodes[0].op_identifier():
            return MatchResult().fail("another operator")
        return super().match(model, graph_or_function, node, **options)


def _with_fast_matcher(rule: rewriter.RewriteRule) -> rewriter.RewriteRule:
    """Return a rule that matches in linear time. onnxscript takes quadratic time for several output nodes: a tenth of the time of an export."""
    pattern = rule._target_pattern
    if pattern.has_single_output_node or pattern.output_nodes[0].op_identifier() is None:
        return rule
    fast = copy.copy(rule)
    fast._matcher = _OperatorFirstMatcher(pattern)
    return fast


@dataclass(frozen=True)
class _Use:
    """A node of an operator, with what is known of its first input: the rank, and the shape for messages."""

    node: ir.Node
    rank: int | None
    shape: str


def _use(node: ir.Node) -> _Use:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return _Use(node, None if shape is None else shape.rank(), str(shape))


def _function(operator: Operator, uses: Sequence[_Use], opset: int) -> ir.Function:
    # If any node uses the optional output, all nodes get it: ONNX Runtime does not inline a body with more outputs than its node.
    nodes = [use.node for use in uses]
    outputs = 2 if any(value.uses() or value.is_graph_output() for node in nodes for value in node.outputs[1:]) else 1
    for node in nodes:
        node.resize_outputs(outputs)
        for value in node.outputs[1:]:
            value.name = value.name or f"{node.outputs[0].name}_activated"
    bodies = [operator.function(opset, use.rank, outputs) for use in uses if use.rank is not None]
    if len(bodies) < len(nodes) or any(body != bodies[0] for body in bodies):
        shapes = ", ".join(use.shape for use in uses)
        raise ExportError(f"the first inputs of all {operator.name} nodes in a graph must have one known rank, got the shapes {shapes}")
    return ir.serde.deserialize_function(bodies[0])


def _only_small(node: ir.Node) -> bool | None:
    """Return False for nodes that read a large constant: folding would store a second copy of a weight, perhaps in another dtype."""
    constants = (value.const_value for value in node.inputs if value is not None and value.const_value is not None)
    return False if any(constant.nbytes >= INLINE_BELOW for constant in constants) else None
