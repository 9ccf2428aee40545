"""Reads ``.pt2`` files that ``torch.export.save`` wrote, without ``torch.export.load``, which runs code from the file.

``torch.export.load`` evaluates size expressions from the file with sympy's ``sympify``, resolves operators as attributes of ``torch`` (``torch.os.system``
is one), generates Python source from names in the file, and unpickles. Here the JSON is read as data: operators come from an allowlist and tensors
from their bytes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from scm_export.checkpoints.archive import open_archive
from scm_export.checkpoints.operator_graph import Call, OperatorGraph, Outputs, ParsedProgram, Ref, Weight, checked_name, from_exported_program, is_assertion
from scm_export.checkpoints.operators import (
    ATEN,
    SUBSTITUTES,
    WITHOUT_IN_PLACE,
    ForbiddenOperatorError,
    Kind,
    check_arguments,
    find_operator,
    is_nonlinear,
    kind_of,
)
from scm_export.checkpoints.torch_export_file import DTYPES, GraphModule, Node, decode_part, read_model, refused
from scm_export.checkpoints.torch_file import TRUST_HINT, current_folder_importable
from scm_export.errors import CheckpointError
from scm_runtime.common.message_text import first_line

MAX_NESTED_SIZES = 12

LAYOUTS = {7: torch.strided}
MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format}


def read_torch_export(source: Path, *, trust: bool = False) -> OperatorGraph:
    """Read the network in a ``.pt2`` file. Without ``trust``, no code from it is run.

    Raises:
        CheckpointError: the file is damaged or of another version, has operators or objects that only trusted loading can open, or was exported
            with a fixed batch size.
    """
    try:
        with open_archive(source) as archive:
            program = _load(source) if trust else _Reader(source, *read_model(source, archive)).read()
        network = OperatorGraph(program, limited=not trust)
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, msgspec.DecodeError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"'{source}' does not hold what torch.export.save writes ({type(error).__name__}: {first_line(error)}). "
            f"Save it again with this torch, {torch.__version__}."
        ) from error
    if static := [name for name, shape in network.shapes.items() if not shape or shape[0] is not None]:
        shapes = ", ".join(f"{name!r}: {{0: batch}}" for name in network.inputs)
        raise CheckpointError(
            f"'{source}' was exported for one batch size ({static[0]} has the shape {list(network.shapes[static[0]])}). Export it with a dynamic one: "
            f"batch = torch.export.Dim('batch'); torch.export.export(network, args, kwargs, dynamic_shapes={{{shapes}}})"
        )
    return network


def _load(source: Path) -> ParsedProgram:
    """Load the program with torch itself, which may run code from the file."""
    try:
        with current_folder_importable(), source.open("rb") as file:
            return from_exported_program(torch.export.load(file))
    except Exception as error:
        raise CheckpointError(f"'{source}' cannot be loaded by torch.export.load: {type(error).__name__}: {first_line(error)}") from error


class _Reader:
    """Converts the JSON of a graph to a :class:`ParsedProgram`."""

    def __init__(self, source: Path, model: GraphModule, stored: Mapping[str, Tensor]) -> None:
        self.source, self.model, self.stored, self.program = source, model, stored, ParsedProgram()
        self.kinds: dict[int, Kind] = {}
        self.nested: dict[int, int] = {}
        """Depth of nested nonlinear arithmetic in each size."""

    def read(self) -> ParsedProgram:
        program = self.program
        for spec in self.model.signature.input_specs:
            self.input(*_only(decode_part(spec)))
        read_only = set(self.kinds)
        for node in self.model.graph.nodes:
            if not is_assertion(node.target.removeprefix(ATEN)):
                self.call(node, read_only)
        outputs = [spec["user_output"]["arg"] for spec in map(decode_part, self.model.signature.output_specs) if "user_output" in spec]
        program.output = program.value_ids[outputs[0]["as_tensor"]["name"]]
        return program

    def input(self, kind: str, spec: Mapping[str, Any]) -> None:
        program = self.program
        match kind:
            case "user_input":
                if "as_tensor" not in spec["arg"]:
                    raise CheckpointError(f"'{self.source}': the program's inputs must be tensors, got one {_only(spec['arg'])[0].removeprefix('as_')!r:.100}")
                name = spec["arg"]["as_tensor"]["name"]
                sizes = decode_part(self.model.graph.tensor_values[name])["sizes"]
                self.kinds[program.define_input(name, tuple(size.get("as_int") for size in sizes))] = "tensor"
            case "parameter" | "buffer" | "tensor_constant":
                target = checked_name(spec[f"{kind}_name"])
                value_id = program.define(spec["arg"]["name"])
                program.weights[value_id], self.kinds[value_id] = Weight(target, self.stored[target], kind == "parameter"), "tensor"
            case "constant_input":
                value_id, value = program.define(spec["name"]), self.argument(spec["value"])
                program.constants[value_id], self.kinds[value_id] = value, kind_of(value, {})
            case _:
                raise refused(self.source, f"an input of the kind {kind[:200]!r}")

    def call(self, node: Node, read_only: set[int]) -> None:
        target = node.target
        try:
            operator = find_operator(target)
        except ForbiddenOperatorError as error:
            name = target.removeprefix(ATEN).partition(".")[0]
            in_place = f" ({WITHOUT_IN_PLACE})" if name.endswith("_") and not name.startswith("_") else ""
            raise refused(self.source, f"the operator {target[:200]!r}", f"which is not one of those that are run without trust{in_place}") from error
        given = [(item.name, self.argument(decode_part(item.arg)), item.kind) for item in node.inputs]
        args = tuple(value for _, value, kind in given if kind != 2)
        if any(name == "train" and value is True for name, value, _ in given):
            raise CheckpointError(f"'{self.source}' was exported in training mode ({target}). Call .eval() on the network and export it again.")
        kwargs = {checked_name(name): value for name, value, kind in given if kind == 2}
        try:
            returned = check_arguments(operator, args, kwargs, self.kinds, read_only)
        except ValueError as error:
            raise CheckpointError(f"'{self.source}' is damaged, or was not written by torch.export.save: {error}. Export the network again.") from error
        depth = self.nesting(operator, args)
        outputs = [self.define(decode_part(item), kind) for item, kind in zip(node.outputs, returned, strict=True)]
        self.nested |= {output: depth for output in outputs if isinstance(output, int)}
        self.program.calls.append(
            Call(target.removeprefix("torch.ops."), SUBSTITUTES.get(operator, operator), args, kwargs, outputs[0] if len(outputs) == 1 else tuple(outputs))
        )

    def nesting(self, operator: Callable[..., Any], args: tuple[Any, ...]) -> int:
        """Depth of nested nonlinear arithmetic in an operator's result. The time to trace it grows exponentially with the depth."""
        if isinstance(operator, torch._ops.OpOverload):
            return 0
        refs = [arg for arg in args if isinstance(arg, Ref)]
        depth = max((self.nested.get(ref.value_id, 0) for ref in refs), default=0) + is_nonlinear(operator, len(refs))
        if depth > MAX_NESTED_SIZES:
            raise CheckpointError(f"'{self.source}' nests more than {MAX_NESTED_SIZES} products and remainders of sizes. {TRUST_HINT}")
        return depth

    def define(self, raw: Mapping[str, Any], kind: Kind) -> Outputs:
        """Assign ids to the values that an operator returns."""
        named, value = _only(raw)
        match named:
            case "as_none":
                return None
            case "as_tensor" | "as_optional_tensor" | "as_sym_int" | "as_sym_float" | "as_sym_bool":
                value_id = self.program.define(value.get("name") or value["as_name"])
                self.kinds[value_id] = kind
                return value_id
            case "as_tensors":
                if kind != "tensors":
                    raise ValueError("an operator returns a list of tensors where it should return one")
                return tuple(self.define({"as_tensor": one}, "tensor") for one in value)
        raise ValueError(f"unknown output {named}")

    def argument(self, raw: Mapping[str, Any]) -> Any:
        kind, value = _only(raw)
        match kind:
            case "as_none":
                return None
            case "as_tensor":
                return self.ref(value["name"])
            case "as_name":
                return self.ref(value)
            case "as_tensors" | "as_nested_tensors":
                return [self.argument({"as_tensors": one}) if isinstance(one, list) else self.ref(one["name"]) for one in value]
            case "as_int" | "as_bool" | "as_string" | "as_ints" | "as_bools" | "as_strings" | "as_int_lists":
                return value
            case "as_float":
                return float(value)  # the file has infinity as a string
            case "as_floats":
                return [float(one) for one in value]
            case "as_sym_int" | "as_sym_float" | "as_sym_bool" | "as_optional_tensor":
                return self.argument(value)
            case "as_sym_ints" | "as_sym_floats" | "as_sym_bools" | "as_optional_tensors":
                return [self.argument(one) for one in value]
            case "as_scalar_type":
                return DTYPES[value]
            case "as_memory_format":
                return MEMORY_FORMATS[value]
            case "as_layout":
                return LAYOUTS[value]
            case "as_device":
                return torch.device("cpu")  # regardless of the device it was exported on
        raise refused(self.source, f"an argument of the kind {kind.removeprefix('as_')[:200]!r}")

    def ref(self, name: str) -> Ref:
        """Reference to a value that is already defined."""
        return Ref(self.program.value_ids[name])


def _only(raw: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the only key and value of a tagged union in the JSON."""
    ((kind, value),) = raw.items()
    return kind, value
