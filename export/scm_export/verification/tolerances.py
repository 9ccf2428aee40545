"""Tolerances for results compared with a float32 reference, used by the exporter's verification and by the tests."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scm_runtime.bundle.manifest import VerifiedCase

# Largest absolute difference of a state with standard deviation 0.5, by the graph's compute dtype and the dtype of its weights. float16 has 11 significant
# bits, bfloat16 has 8. Rounding to float16 changes a weight by up to 5e-4 of its value, and few-step samplers do not average such errors away: at edges of
# an image a well-trained model is steep, and the error of single pixels there is a hundred times that of the others. For half precision MIN_PSNR is
# therefore the effective bound, and the largest difference a coarse one.
SAMPLE_ATOL: dict[tuple[str, str], float] = {
    ("fp32", "fp32"): 5e-4,
    ("fp32", "fp16"): 1e-2,
    ("fp16", "fp16"): 6e-2,
    ("fp32", "bf16"): 8e-2,
    ("bf16", "bf16"): 2.4e-1,
}

# Largest difference of a pixel that a network makes, in levels, including one level for rounding.
PIXEL_ATOL: dict[tuple[str, str], float] = {
    ("fp32", "fp32"): 2,
    ("fp32", "fp16"): 12,
    ("fp16", "fp16"): 24,
    ("fp32", "bf16"): 48,
    ("bf16", "bf16"): 64,
}

# Largest error of a text encoder with quantized linear layers, relative to the largest value of its output, and the lowest PSNR in dB. A weight of 8 bits
# has an error of up to 0.4 % of the range of its block, one of 4 bits 16 times as much.
QUANTIZED_TEXT = {"int8": (0.1, 30.0), "int4": (0.6, 12.0)}

MIN_PSNR = 40.0  # dB, if weights or computation are in half precision: an RMS error of 1 % of the range


def sample_atol(dtype: str, weights_dtype: str, sigma_data: float = 0.5) -> float:
    """Largest allowed absolute difference of a state with standard deviation ``sigma_data``."""
    return SAMPLE_ATOL[dtype, weights_dtype] * sigma_data / 0.5


def min_psnr(dtype: str, weights_dtype: str) -> float | None:
    """Lowest allowed PSNR in dB; None if only the largest difference is checked."""
    return None if (dtype, weights_dtype) == ("fp32", "fp32") else MIN_PSNR


def text_atol(dtype: str, weights_dtype: str, peak: float, sigma_data: float, atol: float | None) -> float:
    """Largest allowed absolute difference of a text encoder's output.

    Rounding errors are in proportion to a few large features, which all encoders have: the tolerance is that of a state with the same peak, four standard
    deviations. ``atol`` is the one that the user gave for states with standard deviation ``sigma_data``, or None.
    """
    peak = max(peak, 1e-6)
    if weights_dtype in QUANTIZED_TEXT:
        return QUANTIZED_TEXT[weights_dtype][0] * peak
    return sample_atol(dtype, weights_dtype, peak / 4) if atol is None else atol * peak / (4 * sigma_data)


def min_text_psnr(dtype: str, weights_dtype: str) -> float | None:
    """Lowest allowed PSNR of a text encoder's output in dB; None if only the largest difference is checked."""
    return QUANTIZED_TEXT[weights_dtype][1] if weights_dtype in QUANTIZED_TEXT else min_psnr(dtype, weights_dtype)


def passes(case: VerifiedCase) -> bool:
    """True if a case is within its tolerances. A case with NaN or infinity never passes."""
    psnr = math.inf if case.psnr is None else case.psnr
    return case.max_abs <= case.atol and psnr >= (-math.inf if case.min_psnr is None else case.min_psnr)


# (atol, rtol) of one operator's output by its dtype: |difference| <= atol + rtol |reference|, for inputs of the order of 1. The reference is computed in
# float32; an implementation in half precision may round after every operation.
OP_TOLERANCE: dict[str, tuple[float, float]] = {
    "float32": (1e-5, 1e-5),
    "float16": (4e-3, 4e-3),
    "bfloat16": (3e-2, 3e-2),
    "uint8": (0, 0),
}

# (atol, rtol) of a float32 matrix product whose factors are each split into two bfloat16, 16 significant bits in total (docs/custom-ops.md).
SPLIT_BF16_TOLERANCE = (5e-5, 5e-5)
