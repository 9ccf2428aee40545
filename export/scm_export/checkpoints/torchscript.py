"""Runs a TorchScript program from Python, operator by operator, so that torch.export can trace it with a dynamic batch size.

Only for trusted files: some TorchScript operators write files, and torch's loader runs methods of the program.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scm_export.checkpoints.archive import check_contents
from scm_export.checkpoints.torch_file import TRUST_HINT
from scm_export.errors import CheckpointError
from scm_runtime.common.message_text import first_line

DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}
SCALAR_TYPES: dict[torch.dtype, int] = {dtype: number for number, dtype in DTYPES.items()}
MEMORY_FORMATS = {0: torch.contiguous_format, 1: torch.preserve_format, 2: torch.channels_last, 3: torch.channels_last_3d}


def read_torchscript(source: Path, *, trust: bool = False) -> tuple[ScriptedNetwork, torch.jit.ScriptModule]:
    """Read the network in a TorchScript archive.

    Returns:
        The network in a form that can be traced with a dynamic batch size, and torch's own module for it, both over the same tensors.

    Raises:
        CheckpointError: the file is not trusted, is damaged, or uses something that cannot be exported.
    """
    if not trust:
        raise CheckpointError(
            f"'{source}' is a TorchScript program, which torch can only load by running code from it, and was not loaded. {TRUST_HINT} "
            "A .pt2 of torch.export.save, or weights with --factory, need no trust."
        )
    check_contents(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, but such files are still in use
            script = torch.jit.load(source, map_location="cpu").eval()
            return ScriptedNetwork(script), script
    except Exception as error:
        raise CheckpointError(f"'{source}' cannot be loaded as TorchScript: {first_line(error)}. Copy or save it again.") from error


class ScriptedNetwork(nn.Module):
    """Runs a program as ``network(x, level, **conditioning)``. Conditioning is passed by the names of the remaining arguments of the program's ``forward``."""

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        super().__init__()
        parameters = {name: tensor.detach() for name, tensor in script.named_parameters()}
        register_tensors(self, parameters, {name: tensor.detach() for name, tensor in script.named_buffers()})
        forward: Any = script.forward
        self.inputs = [argument.name for argument in forward.schema.arguments[1:]]
        self.graph = script.inlined_graph
        self._paths: dict[str, str] = {next(self.graph.inputs()).debugName(): ""}  # dotted attribute names, by value
        self._attributes: dict[str, Any] = {}
        self._read_attributes(script, self.graph)

    def _read_attributes(self, script: torch.jit.ScriptModule, block: Any) -> None:
        for node in block.nodes():
            if node.kind() == "prim::GetAttr":
                base, output = self._paths[node.input().debugName()], node.output().debugName()
                value: Any = reduce(getattr, [*filter(None, base.split(".")), node.s("name")], script)
                self._paths[output] = f"{base}.{node.s('name')}".lstrip(".")
                if isinstance(value, Tensor) and self._paths[output] not in self.state_dict():
                    register_tensors(self, {}, {self._paths[output]: value.detach()})
                elif not isinstance(value, Tensor | torch.jit.ScriptModule):
                    self._attributes[output] = value
            for inner in node.blocks():
                self._read_attributes(script, inner)

    def forward(self, x: Tensor, level: Tensor, **conditioning: Tensor) -> Any:
        given = {**dict(zip(self.inputs, (x, level), strict=False)), **conditioning}
        names = [value.debugName() for value in self.graph.inputs()]
        values: dict[str, Any] = dict(zip(names, [None, *(given[name] for name in self.inputs)], strict=True))
        return self._run(self.graph, values)[0]

    def _run(self, block: Any, values: dict[str, Any]) -> list[Any]:
        for node in block.nodes():
            results = self._node(node, values)
            values.update(zip((output.debugName() for output in node.outputs()), results, strict=True))
        return [values[output.debugName()] for output in block.outputs()]

    def _node(self, node: Any, values: dict[str, Any]) -> list[Any]:
        kind = node.kind()
        if kind == "prim::Constant":
            return [node.output().toIValue()]
        if kind == "prim::GetAttr":
            name = node.output().debugName()
            path = self._paths[name]
            return [self._attributes[name] if name in self._attributes else get_tensor(self, path) if self._is_tensor(path) else None]
        arguments = [values[value.debugName()] for value in node.inputs()]
        if kind == "prim::If":
            return self._run(next(iter(node.blocks())) if arguments[0] else list(node.blocks())[1], values)
        if kind == "prim::Loop":
            return self._loop(next(iter(node.blocks())), arguments, values)
        if kind in PRIMITIVES:
            return PRIMITIVES[kind](arguments)
        if not kind.startswith("aten::"):
            raise NotImplementedError(f"TorchScript's {kind} cannot be exported; export the network with torch.export.save or --factory")
        result = _aten(node, arguments)
        return list(result) if node.outputsSize() > 1 else [result]

    def _is_tensor(self, path: str) -> bool:
        base, _, last = path.rpartition(".")
        holder = self.get_submodule(base)
        return last in holder._parameters or last in holder._buffers

    def _loop(self, body: Any, arguments: list[Any], values: dict[str, Any]) -> list[Any]:
        max_count, condition, *carried = arguments
        inputs = [value.debugName() for value in body.inputs()]
        index = 0
        while condition and index < max_count:
            values.update(zip(inputs, [index, *carried], strict=True))
            condition, *carried = self._run(body, values)
            index += 1
        return carried


def register_tensors(module: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Register tensors under dotted names, creating submodules as needed, so that the ``state_dict`` has the names of the original network.

    Raises:
        ValueError: a name is not valid for a tensor, or is the prefix of another one.
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


def get_tensor(module: nn.Module, name: str) -> Tensor:
    """Return the tensor with a dotted name."""
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), last)
    return tensor


def _raise(arguments: list[Any]) -> list[Any]:
    raise ValueError(f"the program refuses its inputs: {arguments[0]}")


PRIMITIVES: dict[str, Callable[[list[Any]], list[Any]]] = {
    "prim::ListConstruct": lambda items: [list(items)],
    "prim::TupleConstruct": lambda items: [tuple(items)],
    "prim::TupleUnpack": lambda items: list(items[0]),
    "prim::ListUnpack": lambda items: list(items[0]),
    "prim::TupleIndex": lambda items: [items[0][items[1]]],
    "prim::NumToTensor": lambda items: [items[0]],
    "prim::Uninitialized": lambda items: [None],
    "prim::unchecked_cast": lambda items: [items[0]],
    "prim::unchecked_unwrap_optional": lambda items: [items[0]],
    "prim::RaiseException": _raise,
    "prim::dtype": lambda items: [SCALAR_TYPES[items[0].dtype]],
    "prim::device": lambda items: [items[0].device],
    "prim::layout": lambda items: [0],
    "prim::is_cuda": lambda items: [False],
    "prim::requires_grad": lambda items: [False],
    "prim::data": lambda items: [items[0]],
    "prim::min": lambda items: [min(items[0] if len(items) == 1 else items)],
    "prim::max": lambda items: [max(items[0] if len(items) == 1 else items)],
}


def _append(items: list[Any], item: object) -> list[Any]:
    items.append(item)
    return items


def _round_value(rounding: Callable[[Any], Any], value: Any) -> Any:
    return rounding(value) if isinstance(value, float | torch.SymFloat) else value


# TorchScript operators on numbers, lists and sizes, written in Python because sizes are symbolic during tracing.
VALUE_OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "truediv", "neg", "eq", "ne", "lt", "le", "gt", "ge")},
    **{f"__{name}__": getattr(operator, f"{name}_") for name in ("and", "or", "not", "is")},
    "__isnot__": operator.is_not,
    "__getitem__": operator.getitem,
    "__contains__": operator.contains,
    "__range_length": lambda low, high, step: len(range(low, high, step)),
    "__derive_index": lambda index, start, step: start + index * step,
    "remainder": operator.mod,
    "div": operator.truediv,
    "pow": operator.pow,
    "len": len,
    "Int": lambda value: _round_value(math.trunc, value),
    "Float": lambda value: value if isinstance(value, torch.SymFloat) else float(value),
    "Bool": bool,
    "ScalarImplicit": lambda value: value,
    "IntImplicit": lambda value: value,
    "FloatImplicit": lambda value: value,
    "ceil": lambda value: _round_value(math.ceil, value),
    "floor": lambda value: _round_value(math.floor, value),
    "sqrt": lambda value: value**0.5,
    "format": lambda text, *items: text.format(*items),
    "warn": lambda *_: None,
}
LIST_OPERATORS: dict[str, Callable[..., Any]] = {
    "__getitem__": operator.getitem,
    "slice": lambda items, start=None, end=None, step=1: items[start:end:step],
    "add": operator.add,
    "append": _append,
    "len": len,
    "list": list,
}
TENSOR_OPERATORS: dict[str, Callable[..., Any]] = {
    "size": lambda tensor, *axis: tensor.shape[axis[0]] if axis else list(tensor.shape),
    "len": lambda tensor: tensor.shape[0],
    "dim": lambda tensor: tensor.dim(),
    "numel": lambda tensor: tensor.numel(),
    "is_floating_point": lambda tensor: tensor.is_floating_point(),
    "__isnot__": operator.is_not,
    "__is__": operator.is_,
    "Int": int,
    "Float": float,
    "Bool": bool,
    "detach": lambda tensor: tensor.detach(),
    "_convolution": lambda *arguments: torch.ops.aten.convolution(*arguments[:9]),  # recorded by torch.jit.trace with four extra cuDNN settings
}


def _aten(node: Any, arguments: list[Any]) -> Any:
    name, _, overload = node.schema().partition("(")[0].removeprefix("aten::").partition(".")
    kinds = ([LIST_OPERATORS] if arguments and isinstance(arguments[0], list) else []) + [TENSOR_OPERATORS if _holds_tensors(arguments) else VALUE_OPERATORS]
    for table in kinds:
        if name in table:
            return table[name](*arguments)
    found = getattr(getattr(torch.ops.aten, name), overload or "default")
    args, kwargs = [], {}
    for argument, value in zip(found._schema.arguments, arguments, strict=True):
        given = _typed(str(argument.real_type), value)
        if argument.kwarg_only:
            kwargs[argument.name] = given
        else:
            args.append(given)
    return found(*args, **kwargs)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_holds_tensors, value)))


def _typed(type: str, value: Any) -> Any:
    """Convert an argument: TorchScript has integers for dtypes, memory formats and layouts, and a program saved for a GPU is exported on the CPU."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    for kind, table in (("ScalarType", DTYPES), ("MemoryFormat", MEMORY_FORMATS), ("Layout", {0: torch.strided})):
        if kind in type:
            return table[value]
    return value
