"""A network as a list of operators over named values: what an exported program is. Run node by node; no Python source is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

MAX_BITS = 64  # of an integer, a size or what is computed from one; more would be an attack on memory

# What an exported program asserts of its sizes: at this batch size, of that range. The graph is traced again, for every batch.
ASSERTIONS = ("_assert_scalar", "_assert_async", "_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size", "_guards_fn")


@dataclass(frozen=True)
class Ref:
    """A value by name, as an argument."""

    name: str


Outputs = str | tuple["Outputs", ...] | None
"""The names of what an operator returns, nested as it is; None for what nobody reads."""


@dataclass(frozen=True)
class Call:
    """One operator."""

    operator: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Outputs


@dataclass
class Operations:
    """What a file holds of a network, before it is one."""

    inputs: list[str] = field(default_factory=list)
    """Names of the values that the caller gives, in order: state, level, conditioning."""
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    """Of the inputs; None for a free size."""
    tensors: dict[str, str] = field(default_factory=dict)
    """Name of the value to name of the parameter, buffer or constant."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Values that are no tensors."""
    calls: list[Call] = field(default_factory=list)
    output: str = ""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


class OperatorGraph(nn.Module):
    """Runs a program: ``(x, level, **conditioning)``, the conditioning by the names of the program's further inputs."""

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        hold_tensors(self, operations.parameters, operations.buffers)
        self.inputs, self.shapes, self.output = operations.inputs, operations.shapes, operations.output
        self._tensors, self._constants, self._calls = operations.tensors, operations.constants, operations.calls

    def forward(self, x: Tensor, level: Tensor, **conditioning: Tensor) -> Tensor:
        given = {**dict(zip(self.inputs, (x, level), strict=False)), **conditioning}
        values: dict[str, Any] = {name: given[name] for name in self.inputs}
        values |= {name: tensor_named(self, target) for name, target in self._tensors.items()} | self._constants
        for call in self._calls:
            result = call.operator(*_filled(call.args, values), **_filled(call.kwargs, values))
            if isinstance(result, int) and result.bit_length() > MAX_BITS:
                raise ValueError(f"a size must have at most {MAX_BITS} bits, got {result.bit_length()}")
            _bind(call.outputs, result, values)
        y: Tensor = values[self.output]
        return y


def from_exported_program(exported: ExportedProgram) -> Operations:
    """The program of a graph that torch has loaded."""
    operations, module = Operations(), exported.graph_module
    signature = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = signature[node.name]
            if spec.kind == InputKind.USER_INPUT and isinstance(node.meta.get("val"), Tensor):
                operations.inputs.append(node.name)
                operations.shapes[node.name] = tuple(size if isinstance(size, int) else None for size in node.meta["val"].shape)
            elif spec.target is not None:
                operations.tensors[node.name] = spec.target
                kind = operations.parameters if spec.kind == InputKind.PARAMETER else operations.buffers
                kind[spec.target] = (exported.state_dict | exported.constants)[spec.target].detach()
            else:
                operations.constants[node.name] = getattr(spec.arg, "value", None)
        elif node.op == "get_attr":
            operations.constants[node.name] = getattr(module, node.target)
        elif node.op == "call_function" and not is_assertion(node.target.__name__):
            operations.calls.append(Call(node.target, _refs(node.args), _refs(node.kwargs), node.name))
    spec = next(spec for spec in exported.graph_signature.output_specs if spec.kind == OutputKind.USER_OUTPUT)
    operations.output = spec.arg.name
    return operations


def _refs(argument: Any) -> Any:
    match argument:
        case Node():
            return Ref(argument.name)
        case tuple() | list():
            return type(argument)([_refs(item) for item in argument])
        case dict():
            return {key: _refs(item) for key, item in argument.items()}
    return argument


def is_assertion(operator: str) -> bool:
    """Whether an operator only checks sizes, by its name with or without the overload's."""
    return operator.partition(".")[0] in ASSERTIONS


def hold_tensors(module: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Give a module tensors under dotted names, in modules of these names, so that its ``state_dict`` is that of the network it stands for.

    Raises:
        ValueError: a name cannot be one, or is another's beginning.
    """
    tied: dict[tuple[Any, ...], nn.Parameter] = {}
    for name, tensor in {**parameters, **buffers}.items():
        *path, last = name.split(".")
        holder = module
        for part in path:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        try:
            if name in parameters:
                same = (tensor.data_ptr() or name, tensor.dtype, tensor.shape, tensor.stride())
                holder.register_parameter(last, tied.setdefault(same, nn.Parameter(tensor, requires_grad=False)))
            else:
                holder.register_buffer(last, tensor)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"no tensor can be named {name!r}: {error}") from error


def tensor_named(module: nn.Module, name: str) -> Tensor:
    """The tensor of a dotted name."""
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), last)
    return tensor


def _filled(argument: Any, values: Mapping[str, Any]) -> Any:
    match argument:
        case Ref(name=name):
            return values[name]
        case tuple() | list():
            return type(argument)(_filled(item, values) for item in argument)
        case dict():
            return {key: _filled(item, values) for key, item in argument.items()}
    return argument


def _bind(outputs: Outputs, result: Any, values: dict[str, Any]) -> None:
    if isinstance(outputs, str):
        values[outputs] = result
    elif outputs is not None:
        for name, value in zip(outputs, result, strict=True):
            _bind(name, value, values)
