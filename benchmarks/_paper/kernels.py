"""Seconds of the kernels of cuDNN, cuBLAS and ONNX Runtime on paper, in whole waves of tiles.

The larger of arithmetic, traffic from the L2 cache and traffic from memory counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from _paper.gpus import FILL_S, LAUNCH_S, MEMORY_SHARE, REDUCE_S, Gpu
from _paper.layers import Operation

Tile = tuple[int, int]
"""Output pixels by output channels of a block."""

LIBRARY_TILES: tuple[Tile, ...] = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
CUDNN_SPLITS = (1,)  # cuDNN's forward convolutions do not split the sum
CUBLAS_SPLITS = (1, 2, 4, 8)
SPLIT_TERMS = 128  # a block of a split sum has at least so many terms


@dataclass(frozen=True)
class Choice:
    """The fastest tile for an operation, on paper."""

    seconds: float
    tile: Tile
    split: int


def memory_seconds(gpu: Gpu, nbytes: float) -> float:
    """Return the time of reading and writing bytes in memory, without the launch."""
    return nbytes / (gpu.memory_bytes * MEMORY_SHARE)


def elementwise(gpu: Gpu, operation: Operation) -> float:
    """Return the time of an operation that reads and writes maps once."""
    return memory_seconds(gpu, operation.map_bytes) + LAUNCH_S


def follower(gpu: Gpu, operation: Operation) -> float:
    """Return the time of the elementwise operation after a convolution or product, in a kernel of its own; 0 if there is none."""
    return memory_seconds(gpu, follower_bytes(operation)) + LAUNCH_S if operation.follower else 0.0


def follower_bytes(operation: Operation) -> int:
    """Return the bytes that the elementwise operation reads and writes in a kernel of its own."""
    tensors = {"modulate": 2, "norm_modulate": 2, "mp_sum": 3, "": 0}[operation.follower]
    return 2 * operation.pixels * operation.outputs * tensors


def library(gpu: Gpu, operation: Operation) -> Choice:
    """Return cuDNN's or cuBLAS' time for channels-last maps."""
    splits = CUDNN_SPLITS if operation.taps > 1 else CUBLAS_SPLITS
    return min(_choices(gpu, operation, splits), key=lambda choice: choice.seconds)


def _choices(gpu: Gpu, operation: Operation, splits: Sequence[int]) -> list[Choice]:
    terms = operation.inputs * operation.taps
    memory = memory_seconds(gpu, operation.weight_bytes + operation.map_bytes)
    choices = []
    for rows, columns in LIBRARY_TILES:
        for split in splits:
            if split > 1 and terms / split < SPLIT_TERMS:
                continue
            blocks = ceil(operation.pixels / rows) * ceil(operation.outputs / columns) * split
            arithmetic = 2 * rows * columns * terms / split / (gpu.library_share * gpu.tensor_flop / gpu.multiprocessors)
            busy = min(blocks, gpu.multiprocessors)
            loads = gpu.multicast_share * 2 * (rows + columns) * terms / split / min(gpu.l2_bytes / busy, gpu.l2_bytes_each)
            seconds = max(ceil(blocks / gpu.multiprocessors) * max(arithmetic, loads), memory) + FILL_S + LAUNCH_S
            if split > 1:  # float32 partial sums are written and read
                seconds += 2 * 4 * split * operation.pixels * operation.outputs / gpu.l2_bytes + REDUCE_S
            choices.append(Choice(seconds, (rows, columns), split))
    return choices
