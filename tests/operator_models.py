"""Models of one operator, with the inputs of a test case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from scm_export.graphs.build import ir_version
from scm_export.ops import OPERATORS
from scm_export.verification.tolerances import OP_TOLERANCE, SPLIT_BF16_TOLERANCE
from scm_runtime.bundle.manifest import OPS_VERSION

Arrays = tuple[NDArray[Any], ...]
Attribute = float | tuple[int, ...]
PRODUCTS = ("scm.channels_last", "scm.channels_first", "scm.fused")  # domains of convolutions and matrix products


@dataclass(frozen=True)
class Case:
    """Inputs and attributes of an operator. An input is either a shape, to be filled with normally distributed values, or the values."""

    inputs: tuple[tuple[int, ...] | NDArray[Any], ...]
    attributes: Mapping[str, Attribute]


def arrays(op: str, case: Case, dtype: str) -> Arrays:
    """Return the inputs of a case; ``dtype`` is that of the operator's type T."""
    rng = np.random.default_rng(0)
    dtypes = (type_name(kind, dtype) for kind in OPERATORS[op].inputs.values())
    filled = (rng.standard_normal(given) if isinstance(given, tuple) else given for given in case.inputs)
    return tuple(np.asarray(values).astype(name) for values, name in zip(filled, dtypes, strict=True))


def tolerance(op: str, dtype: str) -> tuple[float, float]:
    """Absolute and relative tolerance of an operator's output of a dtype. Some processors multiply float32 numbers as two bfloat16."""
    return SPLIT_BF16_TOLERANCE if OPERATORS[op].domain in PRODUCTS and dtype == "float32" else OP_TOLERANCE[dtype]


def type_name(kind: str, dtype: str) -> str:
    """Return the NumPy name of a type in an operator's schema."""
    return {"T": dtype, "float": "float32"}.get(kind, kind)


def one_node(op: str, inputs: Arrays, attributes: Mapping[str, Attribute], outputs: int, opset: int) -> ModelProto:
    """Return a model with one node. As in exported graphs, the batch size is dynamic and other sizes are static: both affect ONNX Runtime's optimizations."""
    operator = OPERATORS[op]
    element = next((array.dtype.name for array, kind in zip(inputs, operator.inputs.values(), strict=True) if kind == "T"), "")
    result = helper.np_dtype_to_tensor_dtype(np.dtype(type_name(operator.output_type, element)))
    names = operator.output_names(outputs)
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), ["batch", *array.shape[1:]] if array.ndim else [])
        for name, array in zip(operator.inputs, inputs, strict=True)
    ]
    asked = [helper.make_tensor_value_info(name, result, None) for name in names]
    node = helper.make_node(operator.name, list(operator.inputs), names, domain=operator.domain)
    sizes = operator.size_attributes([array.shape for array in inputs])
    node.attribute.extend(helper.make_attribute(name, value) for name, value in {**attributes, **sizes}.items())
    functions = [called.function(opset, inputs[0].ndim) for called in operator.calls] + [operator.function(opset, inputs[0].ndim, outputs)]
    return helper.make_model(
        helper.make_graph([node], operator.name, given, asked),
        functions=functions,
        opset_imports=[helper.make_opsetid("", opset), *(helper.make_opsetid(function.domain, OPS_VERSION) for function in functions)],
        ir_version=ir_version(opset),
    )
