"""The GPUs of the paper model: figures of the data sheets, and the shares of them that kernels reach."""

from __future__ import annotations

from dataclasses import dataclass

OWN_SHARE = 0.85
"""Share of mma.sync's rate that the loop of a kernel with cp.async pipelines reaches; CUTLASS' kernels reach 0.8 to 0.9 on an A100."""


@dataclass(frozen=True)
class Gpu:
    """A GPU. Rates are per second, for the whole device."""

    name: str
    multiprocessors: int
    tensor_flop: float
    """Dense float16 or bfloat16 products accumulated in float32: the data sheet's rate."""
    library_share: float
    """Share of ``tensor_flop`` that cuBLAS and cuDNN reach with large matrices."""
    own_shares: dict[str, float]
    """Share of ``tensor_flop`` that the loop of our kernel reaches, by instruction: mma (mma.sync) and, on Hopper, wgmma."""
    memory_bytes: float
    """Bandwidth of the data sheet."""
    l2_bytes: float
    """Bandwidth of the L2 cache, reads by all multiprocessors."""
    l2_bytes_each: float
    """Bandwidth of the L2 cache, reads by one multiprocessor."""
    multicast_share: float
    """Share of the loads of a library's tile that are left when pairs of blocks load a matrix once (clusters of Hopper); 1 without."""
    shared_kib: int
    """Shared memory of a multiprocessor."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        # H200 data sheet: 989 TFLOP/s, 4.8 TB/s. Library: cuBLAS reaches 750 to 800 TFLOP/s with products of 8192 (the clock falls with the power).
        # mma.sync: 62.9 % of the peak on Hopper, which only wgmma reaches (arXiv 2402.13499). wgmma: a guess for loads by cp.async, without TMA.
        # L2: what a product at the library's rate needs with tiles of 128 x 256 in pairs; one multiprocessor: 85 % of 64 bytes a clock.
        Gpu("H200", 132, 989e12, 0.80, {"mma": 0.629 * OWN_SHARE, "wgmma": 0.70}, 4.8e12, 7.0e12, 95e9, 0.75, 228),
        # A100 80 GB data sheet: 312 TFLOP/s, 2.04 TB/s. mma.sync is the only instruction. L2: as above, with single tiles of 128 x 256.
        Gpu("A100", 108, 312e12, 0.85, {"mma": OWN_SHARE}, 2.04e12, 3.5e12, 75e9, 1.0, 164),
    )
}

MEMORY_SHARE = 0.88
"""Share of the memory bandwidth that streaming kernels reach: 4.2 TB/s on an H200."""
LAUNCH_S = 1.0e-6
"""From the end of a kernel to the start of the next in a CUDA graph."""
FILL_S = 1.5e-6
"""Filling and draining the pipeline of a matrix product or convolution."""
REDUCE_S = 1.0e-6
"""Wait for the last block of a split sum."""
