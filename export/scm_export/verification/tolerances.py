"""How far a result may be from its float32 reference: one table, for the exporter's verification and the tests."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scm_runtime.bundle.manifest import VerifiedCase

# Largest absolute difference of a state whose standard deviation is 0.5, by the dtype the graph computes in and the one its weights are
# stored in. Half precision has 11 significant bits: its rounding alone moves a weight by up to 5e-4 of itself, and few-step
# samplers do not average errors away: a well-trained one is steep where a stroke begins, and single pixels there are off by a
# hundred times the rest. bfloat16 has 8 bits. What bounds graphs in half precision is MIN_PSNR, and the largest error only in the rough.
SAMPLE_ATOL: dict[tuple[str, str], float] = {
    ("fp32", "fp32"): 5e-4,
    ("fp32", "fp16"): 1e-2,
    ("fp16", "fp16"): 6e-2,
    ("fp32", "bf16"): 8e-2,
    ("bf16", "bf16"): 2.4e-1,
}

# Largest difference of a pixel that a network makes, in levels; a level of rounding is part of it.
PIXEL_ATOL: dict[tuple[str, str], float] = {
    ("fp32", "fp32"): 2,
    ("fp32", "fp16"): 12,
    ("fp16", "fp16"): 24,
    ("fp32", "bf16"): 48,
    ("bf16", "bf16"): 64,
}

MIN_PSNR = 40.0  # dB, wherever there is anything in half precision: errors of 1 % of the range


def sample_atol(dtype: str, weights_dtype: str, sigma_data: float = 0.5) -> float:
    """The tolerance for a state whose standard deviation is ``sigma_data``."""
    return SAMPLE_ATOL[dtype, weights_dtype] * sigma_data / 0.5


def min_psnr(dtype: str, weights_dtype: str) -> float | None:
    """The least PSNR allowed, dB; None where the largest difference alone decides."""
    return None if (dtype, weights_dtype) == ("fp32", "fp32") else MIN_PSNR


def passes(case: VerifiedCase) -> bool:
    """Whether a case is within its tolerance; what is not finite never is."""
    psnr = math.inf if case.psnr is None else case.psnr
    return case.max_abs <= case.atol and psnr >= (-math.inf if case.min_psnr is None else case.min_psnr)


# Largest difference of one operator's output from its reference, |difference| <= atol + rtol |reference|, by the output's dtype. The reference is
# computed in float32; an implementation in half precision may round after every operation. The inputs are of the order of 1.
OP_TOLERANCE: dict[str, tuple[float, float]] = {
    "float32": (1e-5, 1e-5),
    "float16": (4e-3, 4e-3),
    "bfloat16": (3e-2, 3e-2),
    "uint8": (0, 0),
}

# The same of a product in float32 whose factors are sums of two bfloat16, 16 bits in all, each (docs/custom-ops.md).
SPLIT_BF16_TOLERANCE = (5e-5, 5e-5)
