"""Checks of an ONNX file that nobody has checked, before ONNX Runtime opens it.

ONNX Runtime refuses malformed graphs, and external data outside of the graph's folder. But it inlines functions without a limit: a file of 1 kB whose
functions call each other twice expands to millions of operators, in hours and gigabytes. This module reads only the operators and functions of a file,
in protobuf's wire format: the package ``onnx`` is not a requirement of the runtime.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from scm_runtime.common.files import open_regular
from scm_runtime.common.message_text import printable

MAX_OPERATORS = 200_000
MAX_EXPANSION = 20
"""With all functions inlined, a graph may have ``MAX_OPERATORS``, or this many times the operators in the file. Exported graphs have 7 times as many."""
MAX_COUNT = 1 << 62  # operators of one function, above which they are not counted: the numbers could have millions of digits
MAX_BYTES = (1 << 31) - 1  # of a protobuf message
STANDARD_DOMAINS = ("ai.onnx", "com.microsoft", "com.ms.")  # prefixes

# Numbers of fields in onnx.proto.
MODEL_GRAPH, MODEL_FUNCTION = 7, 25
GRAPH_NODE = 1
FUNCTION_NAME, FUNCTION_NODE, FUNCTION_DOMAIN, FUNCTION_OVERLOAD = 1, 7, 10, 13
NODE_ATTRIBUTE, NODE_OPERATOR, NODE_DOMAIN, NODE_OVERLOAD = 5, 4, 7, 8
ATTRIBUTE_GRAPHS = (6, 11)

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


class Operator(NamedTuple):
    """Identifies an operator or a function."""

    domain: str
    name: str
    overload: str


def check_graph(path: Path) -> None:
    """Check that a graph's functions can be inlined.

    Raises:
        ValueError: the file is not a protobuf message, has functions in place of standard operators, or has too many operators.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        if not 0 < size <= MAX_BYTES:
            raise ValueError(f"a graph must have from 1 to {MAX_BYTES:,} bytes, got {size:,}")
        contents = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # not closed: an exception's frames refer to parts of it
    written, inlined = _count_operators(memoryview(contents))
    if inlined > (limit := max(MAX_OPERATORS, MAX_EXPANSION * written)):
        raise ValueError(f"a graph must have at most {limit:,} operators with its functions inlined, got {inlined:.6g}")


def _count_operators(model: memoryview) -> tuple[int, int]:
    """Count the operators of a model as it is written, and after all functions are inlined. Raises ValueError."""
    graphs, functions = [], dict[Operator, Counter[Operator]]()
    for number, value in _fields(model):
        if number == MODEL_GRAPH:
            graphs.append(value)
        elif number == MODEL_FUNCTION:
            function, operators = _function(value)
            if not function.domain or function.domain.startswith(STANDARD_DOMAINS):
                replaced = f"{function.domain or 'ai.onnx'}::{function.name}"
                raise ValueError(f"functions must not replace standard operators, got {printable(replaced)}")
            functions[function] = operators
    if not functions:
        return 0, 0  # nothing to inline: the operators need not be counted
    main = _operators([node for graph in graphs for node in _nodes(graph)])
    written = main.total() + sum(operators.total() for operators in functions.values())
    counts = _inlined_counts(functions)
    return written, sum(repeats * counts.get(operator, 1) for operator, repeats in main.items())


def _inlined_counts(functions: dict[Operator, Counter[Operator]]) -> dict[Operator, int]:
    """Return the number of operators in each function after inlining. Raises ValueError if functions call each other in a circle."""
    counts: dict[Operator, int] = {}
    callers: dict[Operator, list[Operator]] = {function: [] for function in functions}
    missing: dict[Operator, int] = {}  # number of called functions that are not counted yet
    for function, nodes in functions.items():
        called = [operator for operator in nodes if operator in functions]
        missing[function] = len(called)
        for operator in called:
            callers[operator].append(function)
    ready = [function for function, number in missing.items() if number == 0]
    while ready:
        function = ready.pop()
        counts[function] = min(sum(repeats * counts.get(operator, 1) for operator, repeats in functions[function].items()), MAX_COUNT)
        for caller in callers[function]:
            missing[caller] -= 1
            if missing[caller] == 0:
                ready.append(caller)
    if len(counts) < len(functions):
        raise ValueError("its functions call each other in a circle")
    return counts


def _function(data: memoryview) -> tuple[Operator, Counter[Operator]]:
    texts, nodes = {FUNCTION_DOMAIN: "", FUNCTION_NAME: "", FUNCTION_OVERLOAD: ""}, []
    for number, value in _fields(data):
        if number in texts:
            texts[number] = str(value, "utf-8")
        elif number == FUNCTION_NODE:
            nodes.append(value)
    return Operator(*texts.values()), _operators(nodes)


def _operators(nodes: list[memoryview]) -> Counter[Operator]:
    """Count the operators of nodes and of their subgraphs."""
    found: Counter[Operator] = Counter()
    while nodes:
        texts = {NODE_DOMAIN: "", NODE_OPERATOR: "", NODE_OVERLOAD: ""}
        for number, value in _fields(nodes.pop()):
            if number in texts:
                texts[number] = str(value, "utf-8")
            elif number == NODE_ATTRIBUTE:
                nodes += [node for field, graph in _fields(value) if field in ATTRIBUTE_GRAPHS for node in _nodes(graph)]
        found[Operator(*texts.values())] += 1
    return found


def _nodes(graph: memoryview) -> list[memoryview]:
    return [value for number, value in _fields(graph) if number == GRAPH_NODE]


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and contents of each field that holds bytes. Raises ValueError if the message is malformed."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            _, at = _varint(message, at)
        elif kind == BYTES:
            size, at = _varint(message, at)
            if at + size <= end:
                yield number, message[at : at + size]
            at += size
        elif kind in (FIXED32, FIXED64):
            at += 4 if kind == FIXED32 else 8
        else:
            raise ValueError("it is not a protobuf message")
        if number == 0 or at > end:
            raise ValueError("it is not a complete protobuf message")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return a number of variable length, and the position after it."""
    value = shift = 0
    for byte in message[at : at + 10]:
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError("it is not a complete protobuf message")
