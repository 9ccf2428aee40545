"""Seconds of our convolution kernel on paper, and the tile that the library chooses: the formulas of cpp_ops/src/convolution/choice.cc."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from _paper.gpus import FILL_S, LAUNCH_S, Gpu
from _paper.kernels import memory_seconds
from _paper.layers import Operation


@dataclass(frozen=True)
class Tile:
    """A tile of the kernel: what a block computes and needs."""

    family: str
    """The instruction, a key of ``Gpu.own_shares``."""
    pixels: int
    channels: int
    shared_kib: int
    max_blocks: int
    """Blocks on a multiprocessor that the registers permit."""

    @property
    def name(self) -> str:
        """Name in op.h."""
        return f"{self.family}_{self.pixels}x{self.channels}"


TILES = (
    Tile("mma", 128, 128, 64, 2),
    Tile("mma", 128, 64, 72, 3),
    Tile("mma", 64, 64, 64, 4),
    Tile("mma", 64, 32, 48, 4),
    Tile("wgmma", 256, 128, 192, 1),
    Tile("wgmma", 128, 128, 128, 1),
    Tile("wgmma", 128, 64, 96, 2),
    Tile("wgmma", 64, 64, 64, 3),
)
NARROW = TILES[3]
"""The only tile for numbers of channels that are not multiples of 8."""
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
LARGE_BATCH = 8
STEP = 64
"""Terms of a sum that a block loads at a time."""
SPLIT_S, PART_S = 1.0e-6, 2.5e-7
"""The last block of a split sum waits for the others, and reads the parts one after another."""
ONE_BLOCK = 0.55
"""Share of its rate that a multiprocessor reaches with one block of several that fit: it does not hide its own latencies."""
NARROW_LOADS = 8
"""Loads of one element at a time take so many times as long as those of 8: a guess. The library does not count this: there is nothing to choose."""


@dataclass(frozen=True)
class Choice:
    """A tile for an operation."""

    seconds: float
    tile: Tile
    split: int


def own(gpu: Gpu, operation: Operation) -> Choice:
    """Return the library's choice and its time, with the operation that follows in the kernel.

    The family and the split do not depend on the batch: the mean of the times per sample, of one sample and of a large batch, decides.
    """
    family, split = ranked(gpu, operation)[0]
    chosen = fastest(gpu, operation, family, split)
    skip_bytes = 2 * operation.pixels * operation.outputs if operation.follower == "mp_sum" else 0
    return replace(chosen, seconds=seconds(gpu, operation, chosen.tile, split, skip_bytes=skip_bytes, single=narrow(operation)))


def ranked(gpu: Gpu, operation: Operation) -> list[tuple[str, int]]:
    """Return the families and splits for an operation, the fastest first."""
    sample = operation.resolution**2
    one, many = replace(operation, pixels=sample), replace(operation, pixels=LARGE_BATCH * sample)
    families = ("mma",) if narrow(operation) else gpu.own_shares
    kinds = [(family, split) for family in families for split in SPLITS if split <= steps(operation)]
    return sorted(kinds, key=lambda kind: fastest(gpu, one, *kind).seconds + fastest(gpu, many, *kind).seconds / LARGE_BATCH)


def fastest(gpu: Gpu, operation: Operation, family: str, split: int) -> Choice:
    """Return the fastest tile of a family."""
    tiles: Iterator[Tile] = iter((NARROW,)) if narrow(operation) else (tile for tile in TILES if tile.family == family)
    return min((Choice(seconds(gpu, operation, tile, split), tile, split) for tile in tiles), key=lambda choice: choice.seconds)


def narrow(operation: Operation) -> bool:
    """Return whether the kernel reads or writes one channel at a time."""
    return bool(operation.inputs % 8 or operation.outputs % 8)


def steps(operation: Operation) -> int:
    """Return the number of steps of a sum: channels are padded to multiples of 8."""
    return ceil(operation.taps * 8 * ceil(operation.inputs / 8) / STEP)


def seconds(gpu: Gpu, operation: Operation, tile: Tile, split: int, *, skip_bytes: int = 0, single: bool = False) -> float:
    """Return the time of the kernel.

    Blocks run in waves. A block takes the time of its operations, or of the loads of its operands from the L2 cache, which all multiprocessors share.

    Args:
        gpu: the GPU.
        operation: the convolution or product.
        tile: a tile that the GPU supports.
        split: blocks that share a sum, at most ``steps(operation)``.
        skip_bytes: bytes of a skip connection, which the library does not count when it chooses.
        single: the kernel reads its input one element at a time.
    """
    terms = STEP * ceil(steps(operation) / split)
    blocks = ceil(operation.pixels / tile.pixels) * ceil(operation.outputs / tile.channels) * split
    most = ceil(blocks / gpu.multiprocessors)
    resident = max(1, min(gpu.shared_kib // tile.shared_kib, tile.max_blocks))
    full = 1.0 if resident == 1 else min(1.0, ONE_BLOCK + (1 - ONE_BLOCK) * (most - 1) / (resident - 1))
    compute = 2 * tile.pixels * tile.channels * terms / (gpu.tensor_flop / gpu.multiprocessors * gpu.own_shares[tile.family] * full)
    loads = 2 * (tile.pixels + tile.channels) * terms / min(gpu.l2_bytes / min(blocks, gpu.multiprocessors), gpu.l2_bytes_each)
    if single and operation.inputs % 8:
        loads *= NARROW_LOADS
    parts = 0.0 if split == 1 else blocks * tile.pixels * tile.channels * 8 / gpu.l2_bytes + SPLIT_S + split * PART_S
    packed = 2 * operation.outputs * operation.taps * 8 * ceil(operation.inputs / 8)
    memory = memory_seconds(gpu, operation.map_bytes + packed + skip_bytes)
    return FILL_S + LAUNCH_S + max(most * max(compute, loads), memory) + parts
