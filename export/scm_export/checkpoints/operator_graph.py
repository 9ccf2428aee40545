"""A network as a list of operators over numbered values: what an exported program is. Run node by node; no Python source is made of it.

Values, parameters and buffers get names of our own. torch makes Python source of the names of parameters and buffers when it traces a network, so a name from
a file must not become one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from scm_export.checkpoints.message_text import printable

MAX_BITS = 64  # of an integer, a size or what is computed from one; more would be an attack on memory
MAX_SIZE = 2**31  # of an integer in a list: a size, a stride, a kernel. Some operators of torch crash on larger ones
MAX_NAME = 512  # characters

# What an exported program asserts of its sizes: at this batch size, of that range. The graph is traced again, for every batch.
ASSERTIONS = ("_assert_scalar", "_assert_async", "_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size", "_guards_fn")


@dataclass(frozen=True)
class Ref:
    """A value by number, as an argument."""

    number: int


Outputs = int | tuple["Outputs", ...] | None
"""The numbers of what an operator returns, nested as it is; None for what nobody reads."""


@dataclass(frozen=True)
class Call:
    """One operator."""

    operator: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Outputs


class Weight(NamedTuple):
    """A parameter, buffer or constant."""

    name: str
    """In the file. Data: nothing is called by it."""
    tensor: Tensor
    is_parameter: bool


@dataclass
class ParsedProgram:
    """What a file holds of a network, before it is one."""

    numbers: dict[str, int] = field(default_factory=dict)
    """Of the values, by their names in the file."""
    inputs: dict[str, int] = field(default_factory=dict)
    """Values that the caller gives, in order: state, level, conditioning."""
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    """Of the inputs; None for a free size."""
    weights: dict[int, Weight] = field(default_factory=dict)
    constants: dict[int, Any] = field(default_factory=dict)
    """Values that are no tensors."""
    calls: list[Call] = field(default_factory=list)
    output: int = -1

    def define(self, name: str) -> int:
        """The number of a new value.

        Raises:
            ValueError: there is a value of this name already, or it cannot be a name.
        """
        if name in self.numbers:
            raise ValueError(f"two values are named {name!r}")
        self.numbers[checked_name(name)] = number = len(self.numbers)
        return number

    def define_input(self, name: str, shape: tuple[int | None, ...]) -> int:
        """A new value that the caller gives. Raises ValueError: see :meth:`define`; or the name is not that of an argument."""
        if not (name.isascii() and name.isidentifier()):
            raise ValueError(f"an input must have the name of an argument, got {name!r}")
        self.inputs[name], self.shapes[name] = self.define(name), shape
        return self.inputs[name]


def checked_name(name: object) -> str:
    """A name from a file as it is, once it is known to be harmless to show.

    Raises:
        ValueError: no text, empty, too long, or with characters that are not printed, such as line ends.
    """
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise ValueError(f"a name must be 1 to {MAX_NAME} printable characters, got '{printable(name)}'")
    return name


class OperatorGraph(nn.Module):
    """Runs a program: ``(x, level, **conditioning)``, the conditioning by the names of the program's further inputs."""

    def __init__(self, operations: ParsedProgram) -> None:
        super().__init__()
        self.inputs, self.shapes, self.output = list(operations.inputs), operations.shapes, operations.output
        self.original_names: dict[str, str] = {}
        """Of parameters and buffers, in the file, by their names here."""
        self._constants, self._calls = operations.constants, operations.calls
        self._input_ids = operations.inputs
        self._tensor_names: dict[int, str] = {}
        tied: dict[tuple[Any, ...], str] = {}
        for number, weight in operations.weights.items():
            tensor = weight.tensor
            same = (weight.is_parameter, tensor.data_ptr() or number, tensor.dtype, tensor.shape, tensor.stride())
            if same not in tied:
                tied[same] = name = f"{'p' if weight.is_parameter else 'b'}{len(tied)}"
                self.original_names[name] = weight.name
                if weight.is_parameter:
                    self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
                else:
                    self.register_buffer(name, tensor)
            self._tensor_names[number] = tied[same]

    def forward(self, x: Tensor, level: Tensor, **conditioning: Tensor) -> Tensor:
        given = {**dict(zip(self.inputs, (x, level), strict=False)), **conditioning}
        values: dict[int, Any] = {number: given[name] for name, number in self._input_ids.items()}
        values |= {number: getattr(self, name) for number, name in self._tensor_names.items()} | self._constants
        for call in self._calls:
            result = call.operator(*_resolve_refs(call.args, values), **_resolve_refs(call.kwargs, values))
            if isinstance(result, int) and result.bit_length() > MAX_BITS:
                raise ValueError(f"a size must have at most {MAX_BITS} bits, got {result.bit_length()}")
            _store_results(call.outputs, result, values)
        y: Tensor = values[self.output]
        return y


def from_exported_program(exported: ExportedProgram) -> ParsedProgram:
    """The program of a graph that torch has loaded."""
    operations, module = ParsedProgram(), exported.graph_module
    signature = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    tensors = exported.state_dict | exported.constants
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = signature[node.name]
            if spec.kind == InputKind.USER_INPUT and isinstance(node.meta.get("val"), Tensor):
                operations.define_input(node.name, tuple(size if isinstance(size, int) else None for size in node.meta["val"].shape))
            elif spec.target is not None:
                weight = Weight(checked_name(spec.target), tensors[spec.target].detach(), spec.kind == InputKind.PARAMETER)
                operations.weights[operations.define(node.name)] = weight
            else:
                operations.constants[operations.define(node.name)] = getattr(spec.arg, "value", None)
        elif node.op == "get_attr":
            operations.constants[operations.define(node.name)] = getattr(module, node.target)
        elif node.op == "call_function" and not is_assertion(node.target.__name__):
            args, kwargs = _to_refs(node.args, operations.numbers), _to_refs(node.kwargs, operations.numbers)
            operations.calls.append(Call(node.target, args, kwargs, operations.define(node.name)))
    spec = next(spec for spec in exported.graph_signature.output_specs if spec.kind == OutputKind.USER_OUTPUT)
    operations.output = operations.numbers[spec.arg.name]
    return operations


def _to_refs(argument: Any, numbers: Mapping[str, int]) -> Any:
    match argument:
        case Node():
            return Ref(numbers[argument.name])
        case tuple() | list():
            return type(argument)([_to_refs(item, numbers) for item in argument])
        case dict():
            return {key: _to_refs(item, numbers) for key, item in argument.items()}
    return argument


def is_assertion(operator: str) -> bool:
    """Whether an operator only checks sizes, by its name with or without the overload's."""
    return operator.partition(".")[0] in ASSERTIONS


def _resolve_refs(argument: Any, values: Mapping[int, Any]) -> Any:
    match argument:
        case Ref(number=number):
            return values[number]
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
        for number, value in zip(outputs, result, strict=True):
            _store_results(number, value, values)
