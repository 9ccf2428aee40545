"""What the options of an export may be. Nothing heavy is imported here: ``scm-export --help`` reads it too."""

from __future__ import annotations

from typing import Literal, get_args

from scm_runtime.bundle.manifest import Dtype

ParametrisationName = Literal["trigflow", "trigflow-negated", "edm", "flow", "x0"]
PARAMETRISATION_NAMES: tuple[ParametrisationName, ...] = get_args(ParametrisationName)

# The dtypes a bundle's graphs compute in, by the dtype its weights are stored in.
GRAPH_DTYPES: dict[Dtype, tuple[Dtype, ...]] = {"fp32": ("fp32",), "fp16": ("fp16", "fp32"), "bf16": ("bf16", "fp32")}

MOST_STEPS = 4  # that whole samplers are composed for unless others are asked for, and that are compared

OPSETS = range(18, 24)
DEFAULT_OPSET: dict[Dtype, int] = {"fp32": 20, "fp16": 20, "bf16": 22}
LOWEST_OPSET: dict[Dtype, int] = {"fp32": OPSETS[0], "fp16": OPSETS[0], "bf16": 22}  # Conv has taken bfloat16 since 22
