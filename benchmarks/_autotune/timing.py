"""Time of one convolution or product on a GPU, through ONNX Runtime: by our kernel with a given tile, or by cuDNN and cuBLAS."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import onnx
from _paper.layers import Operation
from onnx import TensorProto, helper, numpy_helper
from onnxscript import ir

from scm_export.graphs.functions import attach_functions
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.ort.native_ops import Library

OPSET = 20
TILE_VARIABLE = "SCM_CONVOLUTION_TILE"  # SHAPE,SPLIT: read when a kernel is created, in place of the table
RUN_S = 200e-6  # a run takes about so long, that starting it does not count
COLD_BYTES = 64e6  # more weights than the L2 cache holds, as in a step of a large network
MOST_NODES = 64
WARMUP_RUNS, RUNS, ROUNDS = 4, 20, 5


@contextmanager
def forced_tile(tile: tuple[int, int] | None) -> Iterator[None]:
    """Make kernels that are created in the block use a tile: its number in op.h, and the split."""
    if tile is None:
        yield
        return
    os.environ[TILE_VARIABLE] = f"{tile[0]},{tile[1]}"
    try:
        yield
    finally:
        del os.environ[TILE_VARIABLE]


def seconds(operation: Operation, samples: int, expected_s: float, library: Library, tile: tuple[int, int] | None) -> float:
    """Return the seconds of an operation in float16.

    Args:
        operation: the convolution or product; the operation that follows is included.
        samples: batch size.
        expected_s: about how long it takes.
        library: the native library.
        tile: number of the tile in op.h, and the split; None for cuDNN or cuBLAS, and a kernel of its own for the operation that follows.

    Raises:
        Exception: ONNX Runtime's, if it cannot open or run the graph.
    """
    count = node_count(operation, expected_s)
    with forced_tile(tile):
        run = _bound(model(operation, samples, count), operation, samples, count, library, own=tile is not None)
    for _ in range(WARMUP_RUNS):  # two of ONNX Runtime, one that captures
        run(wait=True)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for last in range(RUNS):
            run(wait=last == RUNS - 1)
        times.append((time.perf_counter() - start) / (RUNS * count))
    return median(times)


def node_count(operation: Operation, expected_s: float) -> int:
    """Return how many equal nodes a graph needs for a run that is long, and whose weights come from memory."""
    wanted = max(RUN_S / expected_s, COLD_BYTES / operation.weight_bytes)
    return min(int(wanted) + 1, MOST_NODES)


def model(operation: Operation, samples: int, count: int) -> onnx.ModelProto:
    """Return a graph of equal nodes that read the same x."""
    convolves = operation.taps == 9
    layer = "Conv3x3" if convolves else "MatMul"
    nodes: dict[str, tuple[str, str, list[str], dict[str, Any]]] = {
        "": ("scm.channels_last", layer, [], {}),
        "modulate": ("scm.fused", f"{layer}ModulateSiLU", ["scales"], {"begin": [0], "end": [operation.outputs]}),
        "mp_sum": ("scm.fused", f"{layer}MPSum", ["skip"], {"t": 0.3, "clip": 256.0}),
    }
    domain, name, extra, attributes = nodes[operation.follower]
    shapes = input_shapes(operation, samples)
    size = (operation.outputs, operation.inputs, 3, 3) if convolves else (operation.inputs, operation.outputs)
    block = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float16)
    different = min(count, int(COLD_BYTES / operation.weight_bytes) + 1)
    weights = [numpy_helper.from_array(np.resize(np.roll(block, k), size), f"w{k}") for k in range(different)]
    graph = helper.make_graph(
        [helper.make_node(name, ["x", f"w{k % different}", *extra], [f"y{k}"], domain=domain, **attributes) for k in range(count)],
        "operation",
        [helper.make_tensor_value_info(key, TensorProto.FLOAT16, shape) for key, shape in shapes.items()],
        [helper.make_tensor_value_info(f"y{k}", TensorProto.FLOAT16, [*shapes["x"][:-1], operation.outputs]) for k in range(count)],
        weights,
    )
    made = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(domain, 1)], ir_version=9))
    attach_functions(made)
    return ir.serde.serialize_model(made)


def input_shapes(operation: Operation, samples: int) -> dict[str, list[int]]:
    """Return the shapes of the graph's inputs."""
    side = operation.resolution
    shapes = {"x": [samples, side, side, operation.inputs]}
    if operation.follower == "modulate":
        shapes["scales"] = [samples, operation.outputs]
    if operation.follower == "mp_sum":
        shapes["skip"] = [samples, side, side, operation.outputs]
    return shapes


def _bound(made: onnx.ModelProto, operation: Operation, samples: int, count: int, library: Library, *, own: bool) -> Callable[..., None]:
    """Open the graph and bind it to device memory. Returns a function that runs it, and waits for the device if it is told to."""
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("scm.convolution", "own" if own else "cudnn")
    options.register_custom_ops_library(str(library.path))
    provider = {"enable_cuda_graph": "1", "prefer_nhwc": "1", "cudnn_conv_algo_search": "HEURISTIC"}
    session = ort.InferenceSession(made.SerializeToString(), options, providers=[("CUDAExecutionProvider", provider)], enable_fallback=0)
    binding, random = session.io_binding(), np.random.default_rng(1)
    values = [
        ort.OrtValue.ortvalue_from_numpy(random.standard_normal(shape).astype(np.float16), "cuda", 0) for shape in input_shapes(operation, samples).values()
    ]
    for name, value in zip(input_shapes(operation, samples), values, strict=True):
        binding.bind_ortvalue_input(name, value)
    shape = [samples, operation.resolution, operation.resolution, operation.outputs]
    for k in range(count):
        binding.bind_ortvalue_output(f"y{k}", ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float16, "cuda", 0))
    hurried = ort.RunOptions()
    hurried.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(*, wait: bool) -> None:
        session.run_with_iobinding(binding, None if wait else hurried)

    return run
