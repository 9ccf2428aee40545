"""Looks up the operators of a ``.pt2`` file and checks their arguments against their schemas, before anything runs."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any, Literal

import torch

from scm_export.checkpoints.operator_graph import MAX_SIZE, Ref
from scm_export.checkpoints.operator_list import OPERATORS
from scm_export.checkpoints.program_cost import MAX_PIECES

Kind = Literal["tensor", "tensors", "number", "other"]
"""Kind of a value in a program. "other" is None, a string, a dtype or a list of numbers."""

ATEN = "torch.ops.aten."
WITHOUT_IN_PLACE = "Without operators that work in place: torch.export.export(…).run_decompositions()"
TEXT = re.compile(r"[A-Za-z_,.> -]{0,128}")  # string arguments: modes such as "tanh" and "floor", equations such as "ij,jk->ik"

# Operators on sizes. "**" is left out because its results can have an arbitrary number of digits.
SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"_operator.{name}": getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem")},
    **{f"_operator.{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sqrt", "sym_sum")},
}


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Replacement for ``torch.ops.aten._weight_norm``, which crashes if the shapes of v and g do not match (arXiv 1602.07868, equation 2)."""
    axes = None if dim == -1 else [axis for axis in range(v.ndim) if axis != dim % v.ndim]
    norm: torch.Tensor = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
    return v * (g / norm)


def _batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Replacement for ``_native_batch_norm_legit_no_training``, which reads past the end of a mean or variance shorter than the channels.

    The second and third result are empty.
    """
    y: torch.Tensor = torch.batch_norm(x, weight, bias, mean, variance, False, momentum, eps, False)
    return y, x.new_zeros(0), x.new_zeros(0)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Replacement for ``scaled_dot_product_attention``, which divides by sizes that may be 0."""
    if min(query.ndim, key.ndim, value.ndim) < 2 or any(size == 0 for tensor in (query, key, value) for size in tensor.shape):
        raise ValueError(
            f"attention takes queries, keys and values of two or more dimensions, none empty, got {[tuple(tensor.shape) for tensor in (query, key, value)]}"
        )
    y: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
    return y


def _flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float = 0.0, is_causal: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replacement for ``_scaled_dot_product_flash_attention_for_cpu``, which does not check any size. The second result is empty."""
    return _attention(query, key, value, dropout_p=dropout_p, is_causal=is_causal, **kwargs), query.new_zeros(0)


def _tensor_split(x: torch.Tensor, sections: int, dim: int = 0) -> tuple[torch.Tensor, ...]:
    """Replacement for ``tensor_split``, which first reserves memory for any number of results."""
    if sections > MAX_PIECES:
        raise ValueError(f"tensor_split makes at most {MAX_PIECES} tensors, got sections={sections}")
    return torch.tensor_split(x, sections, dim)


def _empty(size: list[int], *, memory_format: Any = None, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(size, **kwargs)


SUBSTITUTES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten._native_batch_norm_legit_no_training.default: _batch_norm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _flash_attention,
    torch.ops.aten._weight_norm.default: _weight_norm,
    torch.ops.aten.empty.memory_format: _empty,
    torch.ops.aten.empty_like.default: torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_empty.default: torch.ops.aten.new_zeros.default,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    torch.ops.aten.tensor_split.sections: _tensor_split,
}
"""Replacements for operators that crash on tensors of some sizes, or return whatever the memory holds."""


class ForbiddenOperatorError(Exception):
    """The operator is not in the allowlist. The message is its name."""


def find_operator(target: str) -> Callable[..., Any]:
    """Return the operator with a name from a file.

    Raises:
        ForbiddenOperatorError: the operator is not in the allowlist, or this version of torch does not have it.
    """
    if target in SIZE_FUNCTIONS:
        return SIZE_FUNCTIONS[target]
    name, _, overload = target.removeprefix(ATEN).partition(".")
    entry = name if overload in ("", "default") else f"{name}.{overload}"
    found = None
    if target.startswith(ATEN) and entry in OPERATORS:
        found = getattr(getattr(torch.ops.aten, name, None), overload or "default", None)
    if found is None:
        raise ForbiddenOperatorError(target)
    operator: Callable[..., Any] = found
    return operator


def is_nonlinear(function: Callable[..., Any], variables: int) -> bool:
    """Return True if a function on sizes is not linear, given how many of its arguments are not constant."""
    if function in (operator.add, operator.sub, torch.sym_sum):
        return False
    return variables > 1 or function in (operator.mod, torch.sym_max, torch.sym_min)


def check_arguments(
    operator: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], kinds: dict[int, Kind], read_only: set[int]
) -> tuple[Kind, ...]:
    """Check an operator's arguments against its schema.

    Args:
        operator: a result of :func:`find_operator`.
        args: positional arguments: plain values and, for values of the program, :class:`~scm_export.checkpoints.operator_graph.Ref`.
        kwargs: keyword arguments, of the same types.
        kinds: kinds of the program's values by id.
        read_only: ids of the values that must not change: inputs and weights.

    Returns:
        The kinds of the operator's results.

    Raises:
        ValueError: an argument is missing, unknown or of the wrong type, or the operator would change a read-only value in place.
    """
    if not isinstance(operator, torch._ops.OpOverload):
        return (_check_function(operator, args, kwargs, kinds),)
    parameters: dict[str, Any] = {parameter.name: parameter for parameter in operator._schema.arguments}
    positional = [parameter for parameter in parameters.values() if not parameter.kwarg_only]
    if len(args) > len(positional):
        raise ValueError(f"{operator} takes {len(positional)} arguments, got {len(args)}")
    given = {parameter.name: value for parameter, value in zip(positional, args, strict=False)}
    if twice := given.keys() & kwargs.keys() or kwargs.keys() - parameters.keys():
        raise ValueError(f"{operator} takes the arguments {', '.join(parameters)}, got {min(twice)!r} besides")
    given |= kwargs
    for name, parameter in parameters.items():
        if name not in given and not parameter.has_default_value():
            raise ValueError(f"{operator} needs the argument {name}")
        if name in given and not _fits(str(parameter.real_type), given[name], kinds, parameter.N):
            raise ValueError(f"{operator} takes {parameter.real_type} as {name}, got {_described(given[name], kinds)}")
        changes = parameter.alias_info is not None and parameter.alias_info.is_write
        if changes and not (isinstance(given[name], Ref) and given[name].value_id not in read_only):
            raise ValueError(f"{operator} would change {name}, an input or a weight of the network, in place. {WITHOUT_IN_PLACE}")
    return tuple(_kind_of_type(str(result.real_type)) for result in operator._schema.returns)


def _check_function(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], kinds: dict[int, Kind]) -> Kind:
    if function is operator.getitem:
        if len(args) == 2 and not kwargs and kind_of(args[0], kinds) == "tensors" and type(args[1]) is int:
            return "tensor"
        raise ValueError("getitem takes a list of tensors and an index")
    items = args[0] if len(args) == 1 and isinstance(args[0], list) else args  # sym_sum takes a list
    if kwargs or len(items) > 64 or not all(kind_of(item, kinds) == "number" for item in items):
        raise ValueError(f"{getattr(function, '__name__', function)} takes numbers, got {', '.join(_described(item, kinds) for item in args)}")
    return "number"


def kind_of(value: Any, kinds: dict[int, Kind]) -> Kind:
    """Kind of a value; for a Ref, of the value that it refers to."""
    if isinstance(value, Ref):
        return kinds[value.value_id]
    if isinstance(value, torch.Tensor):
        return "tensor"
    return "number" if isinstance(value, bool | int | float) else "other"


def _fits(type: str, value: Any, kinds: dict[int, Kind], length: int | None = None) -> bool:
    """Return True if a value has a type of an operator's schema.

    Args:
        type: type as the schema prints it, such as ``Optional[List[int]]``.
        value: a plain value or a Ref.
        kinds: kinds of the program's values by id.
        length: fixed length of a list type; a single value is then accepted for the whole list.
    """
    if wanted := re.fullmatch(r"Optional\[(.*)\]", type):
        return value is None or _fits(wanted[1], value, kinds, length)
    if wanted := re.fullmatch(r"List\[(.*)\]", type):
        if isinstance(value, list):
            return all(_fits(wanted[1], item, kinds) and not (isinstance(item, int) and abs(item) > MAX_SIZE) for item in value)
        return kind_of(value, kinds) == "tensors" if wanted[1] == "Tensor" else length is not None and _fits(type, [value], kinds)
    kind = kind_of(value, kinds)
    match type:
        case "Tensor":
            return kind in ("tensor", "number")  # torch converts numbers to tensors
        case "number" | "float":
            return kind == "number" or (type == "number" and isinstance(value, Ref) and kind == "tensor")
        case "int":
            return kind == "number" and not isinstance(value, bool | float)
        case "bool":
            return kind == "number" and (isinstance(value, bool | Ref))
        case "str":
            return isinstance(value, str) and TEXT.fullmatch(value) is not None
        case "ScalarType":
            return isinstance(value, torch.dtype)
        case "Device":
            return isinstance(value, torch.device)
        case "Layout":
            return isinstance(value, torch.layout)
        case "MemoryFormat":
            return isinstance(value, torch.memory_format)
    return False


def _kind_of_type(type: str) -> Kind:
    if type in ("int", "float", "bool", "number"):
        return "number"
    return {"Tensor": "tensor", "List[Tensor]": "tensors"}.get(type, "other")  # type: ignore[return-value]  # mypy widens the dict's values to str


def _described(value: Any, kinds: dict[int, Kind]) -> str:
    return f"a {kinds[value.value_id]}" if isinstance(value, Ref) else repr(value)[:60]
