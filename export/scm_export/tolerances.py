"""How far a result may be from its float32 reference: one table, for the exporter's verification and the tests."""

# Largest absolute difference of a state whose standard deviation is 0.5, by the dtype the graph computes in and the one its weights are
# stored in. Half precision has 11 significant bits: its rounding alone moves a weight by up to 5e-4 of itself, and few-step
# samplers do not average errors away.
SAMPLE_ATOL: dict[tuple[str, str], float] = {
    ("fp32", "fp32"): 5e-4,
    ("fp32", "fp16"): 1e-2,
    ("fp16", "fp16"): 3e-2,
}


def sample_atol(dtype: str, weights_dtype: str, sigma_data: float = 0.5) -> float:
    """The tolerance for a state whose standard deviation is ``sigma_data``."""
    return SAMPLE_ATOL[dtype, weights_dtype] * sigma_data / 0.5


# Largest difference of one operator's output from its reference, |difference| <= atol + rtol |reference|, by the output's dtype. The reference is
# computed in float32; an implementation in half precision may round after every operation. The inputs are of the order of 1.
OP_TOLERANCE: dict[str, tuple[float, float]] = {
    "float32": (1e-5, 1e-5),
    "float16": (4e-3, 4e-3),
    "bfloat16": (3e-2, 3e-2),
    "uint8": (0, 0),
}
