"""A network as a list of operator calls on values with integer ids, as in an exported program. It is run call by call.

Parameters and buffers get generated names. torch turns their names into Python source when it traces a network, so a name from a file must not become
one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from scm_runtime.common.message_text import printable

MAX_BITS = 64  # bits of an integer that an operator returns; longer ones could exhaust the memory
MAX_SIZE = 2**31  # largest integer in a list of sizes, strides or kernel sizes; some torch operators crash on larger ones
MAX_NAME = 512  # characters

# Operators with which an exported program checks its sizes. They are skipped: the graph is traced again with a dynamic batch size.
ASSERTIONS = ("_assert_scalar", "_assert_async", "_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size", "_guards_fn")


@dataclass(frozen=True)
class Ref:
    """A reference to a value by its id, used as an argument."""

    value_id: int


Outputs = int | tuple["Outputs", ...] | None
"""Ids of the values that an operator returns, nested like its result; None for an unused value."""


@dataclass(frozen=True)
class Call:
    """One call of an operator."""

    operator: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Outputs


class Weight(NamedTuple):
    """A parameter, buffer or constant."""

    name: str
    """Name in the file. It is only data: no attribute gets this name."""
    tensor: Tensor
    is_parameter: bool


@dataclass
class ParsedProgram:
    """Contents of a program file, from which :class:`OperatorGraph` is built."""

    value_ids: dict[str, int] = field(default_factory=dict)
    """Ids of all values, by their names in the file."""
    inputs: dict[str, int] = field(default_factory=dict)
    """Ids of the inputs by name, in order: state, level, conditioning."""
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    """Shapes of the inputs by name; None for a dynamic dimension."""
    weights: dict[int, Weight] = field(default_factory=dict)
    constants: dict[int, Any] = field(default_factory=dict)
    """Values that are not tensors, by id."""
    calls: list[Call] = field(default_factory=list)
    output: int = -1

    def define(self, name: str) -> int:
        """Assign an id to a new value.

        Raises:
            ValueError: the name is already in use, or is not valid.
        """
        if name in self.value_ids:
            raise ValueError(f"two values are named {name!r}")
        self.value_ids[checked_name(name)] = value_id = len(self.value_ids)
        return value_id

    def define_input(self, name: str, shape: tuple[int | None, ...]) -> int:
        """Assign an id to a new input. Raises ValueError as :meth:`define` does, and for a name that cannot be a Python argument."""
        if not (name.isascii() and name.isidentifier()):
            raise ValueError(f"an input must have the name of an argument, got {name!r}")
        self.inputs[name], self.shapes[name] = self.define(name), shape
        return self.inputs[name]


def checked_name(name: object) -> str:
    """Return a name from a file unchanged if it is safe to print.

    Raises:
        ValueError: it is not text, is empty or too long, or has characters that cannot be printed, such as line breaks.
    """
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise ValueError(f"a name must be 1 to {MAX_NAME} printable characters, got '{printable(name)}'")
    return name


class OperatorGraph(nn.Module):
    """Runs a program as ``network(x, level, **conditioning)``. Conditioning is passed by the names of the program's remaining inputs."""

    def __init__(self, program: ParsedProgram) -> None:
        super().__init__()
        self.inputs, self.shapes, self.output = list(program.inputs), program.shapes, program.output
        self.original_names: dict[str, str] = {}
        """Names of parameters and buffers in the file, by their names in this module."""
        self._constants, self._calls = program.constants, program.calls
        self._input_ids = program.inputs
        self._tensor_names: dict[int, str] = {}
        tied: dict[tuple[Any, ...], str] = {}
        for value_id, weight in program.weights.items():
            tensor = weight.tensor
            same = (weight.is_parameter, tensor.data_ptr() or value_id, tensor.dtype, tensor.shape, tensor.stride())
            if same not in tied:
                tied[same] = name = f"{'p' if weight.is_parameter else 'b'}{len(tied)}"
                self.original_names[name] = weight.name
                if weight.is_parameter:
                    self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
                else:
                    self.register_buffer(name, tensor)
            self._tensor_names[value_id] = tied[same]

    def forward(self, x: Tensor, level: Tensor, **conditioning: Tensor) -> Tensor:
        given = {**dict(zip(self.inputs, (x, level), strict=False)), **conditioning}
        values: dict[int, Any] = {value_id: given[name] for name, value_id in self._input_ids.items()}
        values |= {value_id: getattr(self, name) for value_id, name in self._tensor_names.items()} | self._constants
        for call in self._calls:
            result = call.operator(*_resolve_refs(call.args, values), **_resolve_refs(call.kwargs, values))
            if isinstance(result, int) and result.bit_length() > MAX_BITS:
                raise ValueError(f"a size must have at most {MAX_BITS} bits, got {result.bit_length()}")
            _store_results(call.outputs, result, values)
        y: Tensor = values[self.output]
        return y


def from_exported_program(exported: ExportedProgram) -> ParsedProgram:
    """Convert a program that torch has loaded."""
    program, module = ParsedProgram(), exported.graph_module
    signature = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    tensors = exported.state_dict | exported.constants
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = signature[node.name]
            if spec.kind == InputKind.USER_INPUT and isinstance(node.meta.get("val"), Tensor):
                program.define_input(node.name, tuple(size if isinstance(size, int) else None for size in node.meta["val"].shape))
            elif spec.target is not None:
                weight = Weight(checked_name(spec.target), tensors[spec.target].detach(), spec.kind == InputKind.PARAMETER)
                program.weights[program.define(node.name)] = weight
            else:
                program.constants[program.define(node.name)] = getattr(spec.arg, "value", None)
        elif node.op == "get_attr":
            program.constants[program.define(node.name)] = getattr(module, node.target)
        elif node.op == "call_function" and not is_assertion(node.target.__name__):
            args, kwargs = _to_refs(node.args, program.value_ids), _to_refs(node.kwargs, program.value_ids)
            program.calls.append(Call(node.target, args, kwargs, program.define(node.name)))
    spec = next(spec for spec in exported.graph_signature.output_specs if spec.kind == OutputKind.USER_OUTPUT)
    program.output = program.value_ids[spec.arg.name]
    return program


def _to_refs(argument: Any, value_ids: Mapping[str, int]) -> Any:
    match argument:
        case Node():
            return Ref(value_ids[argument.name])
        case tuple() | list():
            return type(argument)([_to_refs(item, value_ids) for item in argument])
        case dict():
            return {key: _to_refs(item, value_ids) for key, item in argument.items()}
    return argument


def is_assertion(operator: str) -> bool:
    """Return True if an operator, given with or without its overload name, only checks sizes."""
    return operator.partition(".")[0] in ASSERTIONS


def _resolve_refs(argument: Any, values: Mapping[int, Any]) -> Any:
    match argument:
        case Ref(value_id=value_id):
            return values[value_id]
        case tuple() | list():
            items = [_resolve_refs(item, values) for item in argument]
            if isinstance(argument, list) and any(isinstance(item, int) and abs(item) > MAX_SIZE for item in items):
                raise ValueError(f"a size must be at most {MAX_SIZE}, got {max(item for item in items if isinstance(item, int))}")
            return type(argument)(items)
        case dict():
            return {key: _resolve_refs(item, values) for key, item in argument.items()}
    return argument


def _store_results(outputs: Outputs, result: Any, values: dict[int, Any]) -> None:
    if isinstance(outputs, int):
        values[outputs] = result
    elif outputs is not None:
        for value_id, value in zip(outputs, result, strict=True):
            _store_results(value_id, value, values)
