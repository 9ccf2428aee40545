"""Count the floating point operations of a graph: it runs once with ONNX Runtime's profiling, which records the shapes of every node.

It runs without the native library, so that function bodies run, and without optimizations, so that no node is fused or padded: the count is a property of
the model. A multiplication with its addition counts as two operations. Only convolutions and matrix products count.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.devices.placement import Placement
from scm_runtime.ort.open_session import open_session
from scm_runtime.ort.options import SessionSettings

Shape = Sequence[int]


class Count(NamedTuple):
    """Operations of one run of a graph."""

    flop: int
    uncounted: frozenset[str]
    """Operators that were not counted: they multiply matrices, but their shapes alone do not tell the number of operations."""


def _convolution(inputs: Sequence[Shape], output: Shape) -> int:
    return 2 * math.prod(output) * math.prod(inputs[1][1:])  # W is [out, in / groups, *kernel]


def _transposed(inputs: Sequence[Shape], _output: Shape) -> int:
    return 2 * math.prod(inputs[0]) * math.prod(inputs[1][1:])  # W is [in, out / groups, *kernel]


def _product(inputs: Sequence[Shape], output: Shape) -> int:
    return 2 * math.prod(output) * inputs[0][-1]


def _gemm(inputs: Sequence[Shape], output: Shape) -> int:
    return 2 * output[1] * math.prod(inputs[0])  # A has rows x inner elements, transposed or not


RULES: dict[str, Callable[[Sequence[Shape], Shape], int]] = {
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "ConvTranspose": _transposed,
    "MatMul": _product,
    "MatMulInteger": _product,
    "Gemm": _gemm,
}
UNKNOWN = frozenset(("Attention", "DeformConv", "Einsum", "GRU", "GroupQueryAttention", "LSTM", "MultiHeadAttention", "QLinearConv", "QLinearMatMul", "RNN"))


def count_graph(path: Path, placement: Placement, threads: int | None, inputs: Mapping[str, NDArray[Any]]) -> Count:
    """Run a graph once with these inputs, and count its operations. Raises what ``open_session`` raises."""
    plain = load_onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(
            path, SessionSettings(placement, threads=threads, low_memory=True, profile_dir=Path(folder), session_options={"graph_optimization_level": plain})
        )
        session(**inputs)
        session.end_profiling()
        (profile,) = Path(folder).glob("*.json")
        return count_events(json.loads(profile.read_bytes()))


def count_events(events: Sequence[Mapping[str, Any]]) -> Count:
    """Count the operations of the nodes in a profile's events."""
    flop, uncounted = 0, set()
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") != "Node" or "output_type_shape" not in arguments:
            continue
        operator = arguments["op_name"]
        if operator in UNKNOWN:
            uncounted.add(operator)
        elif rule := RULES.get(operator):
            flop += rule(_shapes(arguments["input_type_shape"]), _shapes(arguments["output_type_shape"])[0])
    return Count(flop, frozenset(uncounted))


def _shapes(entries: Sequence[Mapping[str, Shape]]) -> list[Shape]:
    """Shapes from a profile's entries, [{"float": [1, 2]}, …]."""
    return [next(iter(entry.values()), ()) for entry in entries]


def step_inputs(shape: Sequence[int], times: Sequence[float], conditioning: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Inputs of the step graph for one sample, from the conditioning of a batch."""
    x = np.zeros((1, *shape), np.float32)
    t, t_next = (np.array([time], np.float32) for time in times[:2])
    return {"x": x, "noise": x, "t": t, "t_next": t_next, **{name: values[:1] for name, values in conditioning.items()}}
