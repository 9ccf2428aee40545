"""A network as a list of operator calls on values with integer ids, as in an exported program. It is run call by call.

Parameters and buffers get generated names. torch turns their names into Python source when it traces a network, so a name from a file must not become
one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from scm_export.checkpoints.program_cost import without_data
from scm_runtime.common.message_text import printable

MAX_BITS = 64  # bits of an integer that an operator returns; longer ones could exhaust the memory
MAX_SIZE = 2**31  # largest integer in a list of sizes, strides or kernel sizes; some torch operators crash on larger ones
MAX_NAME = 512  # characters
MAX_VALUES = 100_000  # inputs, weights and results of operators

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

    name: str
    """Name of the operator, for messages."""
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
            ValueError: the name is already in use, or is not valid, or there are too many values.
        """
        if name in self.value_ids:
            raise ValueError(f"two values are named {name!r}")
        if len(self.value_ids) >= MAX_VALUES:
            raise ValueError(f"the program has more than {MAX_VALUES} values")
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

    def __init__(self, program: ParsedProgram, *, limited: bool) -> None:
        """Build the network.

        Args:
            program: contents of the file.
            limited: evaluate the program on tensors without data first, for every new shape of its inputs, and refuse it beyond the limits of
                :mod:`~scm_export.checkpoints.program_cost`.
        """
        super().__init__()
        self.inputs, self.shapes, self.output = list(program.inputs), program.shapes, program.output
        self.original_names: dict[str, str] = {}
        """Names of parameters and buffers in the file, by their names in this module."""
        self._constants, self._calls = program.constants, program.calls
        self._last_uses = _last_uses(program)
        self._input_ids = program.inputs
        self._limited = limited
        self._checked_shapes: set[tuple[Any, ...]] = set()
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
        self._weight_count = sum(tensor.numel() for tensor in self.state_dict().values())

    def forward(self, x: Tensor, level: Tensor, **conditioning: Tensor) -> Tensor:
        given = {**dict(zip(self.inputs, (x, level), strict=False)), **conditioning}
        values: dict[int, Any] = {value_id: given[name] for name, value_id in self._input_ids.items()}
        values |= {value_id: getattr(self, name) for value_id, name in self._tensor_names.items()} | self._constants
        if self._limited and type(x) is Tensor and not torch.compiler.is_compiling():  # tracers pass tensors without data
            self._check_cost(values, tuple(given[name].shape for name in self._input_ids))
        return self._run(values)

    def _check_cost(self, values: dict[int, Any], shapes: tuple[Any, ...]) -> None:
        if shapes not in self._checked_shapes:
            with without_data(values, self._weight_count, shapes[0][0]) as (dataless, meter):
                self._run(dataless, meter.start_operator)
            self._checked_shapes.add(shapes)

    def _run(self, values: dict[int, Any], before_call: Callable[[str], None] = lambda _: None) -> Tensor:
        for call, last_uses in zip(self._calls, self._last_uses, strict=True):
            before_call(call.name)
            result = call.operator(*_resolve_refs(call.args, values), **_resolve_refs(call.kwargs, values))
            if isinstance(result, int) and result.bit_length() > MAX_BITS:
                raise ValueError(f"a size must have at most {MAX_BITS} bits, got {result.bit_length()}")
            _store_results(call.outputs, result, values)
            del result
            for value_id in last_uses:
                values.pop(value_id, None)
        y: Tensor = values[self.output]
        return y


def _last_uses(program: ParsedProgram) -> list[list[int]]:
    """For each call, ids of the values that no later call needs."""
    needed, last_uses = {program.output}, []
    for call in reversed(program.calls):
        used = {*_referenced((call.args, call.kwargs)), *_defined(call.outputs)}
        last_uses.append(list(used - needed))
        needed |= used
    return last_uses[::-1]


def _referenced(argument: Any) -> Iterator[int]:
    match argument:
        case Ref(value_id=value_id):
            yield value_id
        case tuple() | list():
            for item in argument:
                yield from _referenced(item)
        case dict():
            yield from _referenced(list(argument.values()))


def _defined(outputs: Outputs) -> Iterator[int]:
    if isinstance(outputs, int):
        yield outputs
    elif outputs is not None:
        for inner in outputs:
            yield from _defined(inner)


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
            program.calls.append(Call(node.target.__name__, node.target, args, kwargs, program.define(node.name)))
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
