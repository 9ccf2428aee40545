"""Allowed values of the export options. Imports nothing heavy, since ``scm-export --help`` reads this module."""

from __future__ import annotations

from typing import Literal, get_args

from scm_runtime.bundle.manifest import Dtype

ParametrisationName = Literal["trigflow", "trigflow-negated", "edm", "flow", "x0"]
PARAMETRISATION_NAMES: tuple[ParametrisationName, ...] = get_args(ParametrisationName)

SchedulerName = Literal["lcm", "euler", "euler-ancestral", "ddim", "tcd"]
SCHEDULER_NAMES: tuple[SchedulerName, ...] = get_args(SchedulerName)

PredictionType = Literal["epsilon", "v_prediction", "sample"]
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)

GRAPH_DTYPES: dict[Dtype, tuple[Dtype, ...]] = {"fp32": ("fp32",), "fp16": ("fp16", "fp32"), "bf16": ("bf16", "fp32")}
"""Dtypes that a bundle's graphs compute in, by the dtype its weights are stored in."""

TextDtype = Literal["fp32", "fp16", "bf16", "int8", "int4"]
TEXT_DTYPES: tuple[TextDtype, ...] = get_args(TextDtype)
QUANTIZED_BITS = {"int8": 8, "int4": 4}
"""Bits per weight of a linear layer, by the dtypes of text encoders that quantize them."""


def text_graph_dtypes(text_dtype: TextDtype, weights_dtype: Dtype) -> tuple[Dtype, ...]:
    """Dtypes that the text graphs compute in: fp32, and the dtype of the encoder's weights if the bundle has graphs in it."""
    return tuple(dtype for dtype in GRAPH_DTYPES[weights_dtype] if dtype in ("fp32", text_dtype))


MAX_COMPOSED_STEPS = 4  # largest step count for which samplers are composed by default and verified
LARGEST_SAMPLER = 64  # steps; a composed sampler has a copy of the network's nodes for each step

OPSETS = range(18, 24)
DEFAULT_OPSET: dict[Dtype, int] = {"fp32": 20, "fp16": 20, "bf16": 22}
MIN_OPSET: dict[Dtype, int] = {"fp32": OPSETS[0], "fp16": OPSETS[0], "bf16": 22}  # Conv accepts bfloat16 since opset 22
