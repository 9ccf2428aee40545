"""Nodes of the ``scm`` operators in the graph that torch.onnx translates a traced network to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx.defs import OpSchema
from onnxscript import ir
from onnxscript.values import Op, Opset

from scm_export.ops.operator import Operator
from scm_runtime.bundle.manifest import OPS_VERSION

FLOAT_TYPES = ("float", "float16", "bfloat16")


def add_node(operator: Operator, inputs: Sequence[Any], like: Any, shape: Sequence[Any], **attributes: float | Sequence[int]) -> Any:
    """Add a node to the graph that is being translated to, from within a function of a ``custom_translation_table``.

    Args:
        operator: has one output.
        inputs: values of the translation.
        like: a value with the type of the output.
        shape: of the output; a dynamic size is the one of an input.
        attributes: the attributes of the operator, without the sizes that only its body reads.

    Returns:
        The output.
    """
    sizes = operator.size_attributes([[size if isinstance(size, int) else 0 for size in x.shape] for x in inputs])
    given = {**attributes, **sizes}
    schema = OpSchema(
        operator.name,
        operator.domain,
        OPS_VERSION,
        inputs=[OpSchema.FormalParameter(name, "T" if kind == "T" else f"tensor({kind})") for name, kind in operator.inputs.items()],
        outputs=[OpSchema.FormalParameter(operator.output, "T")],
        type_constraints=[("T", [f"tensor({name})" for name in FLOAT_TYPES], "")],
        attributes=[OpSchema.Attribute(name, _kind(value)) for name, value in given.items()],
    )
    output: Any = Op(Opset(operator.domain, OPS_VERSION), operator.name, schema)(*inputs, **given)
    return typed(output, like, shape)


def typed(value: Any, like: Any, shape: Sequence[Any]) -> Any:
    """Return a value after setting its type to that of another one, and its shape."""
    value.dtype, value.shape = like.dtype, ir.Shape(shape)
    return value


def _kind(attribute: object) -> OpSchema.AttrType:
    if isinstance(attribute, Sequence):
        return OpSchema.AttrType.INTS
    return OpSchema.AttrType.INT if isinstance(attribute, int) else OpSchema.AttrType.FLOAT
