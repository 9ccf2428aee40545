"""Measure a GPU's peak in matrix products and in copying, through ONNX Runtime: chains of products and of negations, in small graphs.

The matrices are created on the device by repeating one block, so that almost nothing is copied to it or from it. The block is orthogonal and divided by the
number of repetitions, so that its products neither grow nor vanish. tests/runtime/test_bench_peak.py has the source of the graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.manifest import Dtype
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.devices.placement import CUDA_PROVIDER, Placement
from scm_runtime.ort.open_session import open_session
from scm_runtime.ort.options import SessionSettings

GRAPHS = Path(str(files("scm_runtime") / "peaks"))
BLOCK = 64
CHAIN = {"product": 16, "copy": 32}  # number of operators in a graph, in sequence
SIZE: dict[Dtype, int] = {"fp32": 4096, "fp16": 8192, "bf16": 8192}
COPIED_BYTES = 256 << 20
TRIES = 5


def matmul_rate(placement: Placement, dtype: Dtype, size: int) -> float:
    """Floating point operations per second of products [size, size] in a dtype; ``size`` is a multiple of BLOCK. Raises what ``open_session`` raises."""
    orthogonal, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((BLOCK, BLOCK)))
    repeats = size // BLOCK
    seconds = _fastest(placement, f"product.{dtype}.onnx", (orthogonal / repeats).astype(np.float32), np.array([repeats, repeats], np.int64))
    return 2 * size**3 * CHAIN["product"] / seconds


def copy_rate(placement: Placement, nbytes: int) -> float:
    """Bytes read and written per second by negations that read and write ``nbytes`` each. Raises what ``open_session`` raises."""
    block = np.linspace(-1, 1, BLOCK, dtype=np.float32)
    repeats = nbytes // block.nbytes
    return 2 * repeats * block.nbytes * CHAIN["copy"] / _fastest(placement, "copy.onnx", block, np.array([repeats], np.int64))


def _fastest(placement: Placement, graph: str, block: NDArray[np.float32], repeats: NDArray[np.int64]) -> float:
    # Without TF32, as for bundles.
    providers = tuple((name, {**options, "use_tf32": "0"} if name == CUDA_PROVIDER else options) for name, options in placement.providers)
    plain = load_onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
    session = open_session(GRAPHS / graph, SessionSettings(replace(placement, providers=providers), session_options={"graph_optimization_level": plain}))
    return min(_seconds(lambda: session(block=block, repeats=repeats)) for _ in range(TRIES))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
