"""Common parts of the operators of the domain ``scm``: their nodes in a trace, and their ONNX function bodies.

The operators are specified in docs/custom-ops.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from onnx import FunctionProto, parser
from torch import Tensor

from scm_runtime.bundle.manifest import OPS_DOMAIN, OPS_VERSION

_emits_nodes = ContextVar("emits_nodes", default=False)


@contextmanager
def operators_as_nodes() -> Iterator[None]:
    """Within the block, the functions of ``scm_export.ops`` emit nodes of their operators. For torch.onnx.export only: the nodes do not compute anything."""
    token = _emits_nodes.set(True)
    try:
        yield
    finally:
        _emits_nodes.reset(token)


def emits_nodes() -> bool:
    """Return True if functions of ``scm_export.ops`` must emit nodes."""
    # torch.compile cannot read a ContextVar and would break the graph at every operator.
    return not torch.compiler.is_dynamo_compiling() and _emits_nodes.get()


def silu_statements(x: str, y: str) -> str:
    """Statements for ``y = silu(x) / 0.596`` in ONNX's textual syntax, used for MPSiLU and for every second output."""
    return f"""
        {y}_sigmoid = Sigmoid ({x})
        {y}_silu = Mul ({x}, {y}_sigmoid)
        {y}_rms = Constant <value_float = 0.596> ()
        {y}_divisor = CastLike ({y}_rms, {x})
        {y} = Div ({y}_silu, {y}_divisor)
    """


def balance_statements(a: str, b: str) -> str:
    """Statements for ``a = (1-t) / sqrt((1-t)^2 + t^2)`` and ``b = t / sqrt((1-t)^2 + t^2)``, from the attribute t. Also defines ``one``."""
    return f"""
        one = Constant <value_float = 1.0> ()
        t = Constant <value_float: float = @t> ()
        rest = Sub (one, t)
        t_square = Mul (t, t)
        rest_square = Mul (rest, rest)
        squares = Add (t_square, rest_square)
        magnitude = Sqrt (squares)
        {a} = Div (rest, magnitude)
        {b} = Div (t, magnitude)
    """


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator: its schema and the statements of its ONNX function body.

    The statements are in ONNX's textual syntax, with attributes written as ``@name``. ``{inner_axes}`` stands for the axes of the first input
    between the first and the last one, ``{sample_axes}`` for all axes but the first. A body is generated for one rank, because axes that the graph
    computes would keep ONNX Runtime from inferring shapes and cost a copy of the feature map.
    """

    domain: str = OPS_DOMAIN
    name: str
    inputs: dict[str, str]
    """Types of the inputs by name: T, which is the same type for all inputs of a node, or the name of an ONNX type."""
    output: str
    output_type: str
    body: str
    attributes: tuple[str, ...] = ()
    sizes: Mapping[str, Callable[..., int | Sequence[int]]] = field(default_factory=dict)
    """Further attributes, by name: sizes that only the body reads, each a function of the shapes of the inputs. ONNX Runtime computes what a body takes from
    the operator Shape in every run, on a GPU with copies to the host, even if that size is static."""
    activated: bool = False
    """True if the operator has an optional second output, ``mp_silu`` of the first."""
    calls: tuple[Operator, ...] = ()
    """Operators that the body consists of, besides standard ones. Their first inputs have the rank of this operator's."""

    @property
    def identifier(self) -> str:
        """Domain and name, ``"scm::PixelNorm"``."""
        return f"{self.domain}::{self.name}"

    def node(
        self,
        *inputs: Tensor,
        outputs: int = 1,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        **attributes: float | Sequence[int],
    ) -> Sequence[Tensor]:
        """Emit a node in the traced graph. Unless given, shape and dtype of its outputs are those of the first input."""
        like = inputs[0]
        sizes = self.size_attributes([x.shape for x in inputs])
        shapes = [like.shape if shape is None else shape] * outputs
        return torch.onnx.ops.symbolic_multi_out(
            self.identifier, inputs, {**attributes, **sizes}, dtypes=[dtype or like.dtype] * outputs, shapes=shapes, version=OPS_VERSION
        )

    def size_attributes(self, shapes: Sequence[Sequence[int]]) -> dict[str, int | Sequence[int]]:
        """Return the attributes ``sizes`` of a node, from the shapes of its inputs."""
        return {name: size(*shapes) for name, size in self.sizes.items()}

    def output_names(self, outputs: int) -> list[str]:
        """Names of the first ``outputs`` outputs, 1 or 2."""
        return [self.output, "activated"][:outputs]

    def function(self, opset: int, rank: int, outputs: int = 1) -> FunctionProto:
        """Return the function body for an operator set, a rank of the first input and a number of outputs."""
        names = self.output_names(outputs)
        body = self.body + (silu_statements(names[0], "activated") if outputs == 2 else "")
        for placeholder, axes in (("{inner_axes}", range(1, rank - 1)), ("{sample_axes}", range(1, rank))):
            body = body.replace(placeholder, str(list(axes)))
        names_of_attributes = (*self.attributes, *self.sizes)
        attributes = f"<{', '.join(names_of_attributes)}>" if names_of_attributes else ""
        signature = f"{self.name} {attributes} ({', '.join(self.inputs)}) => ({', '.join(names)})"
        imports = ", ".join(f'"{domain}": {version}' for domain, version in {"": opset, **{called.domain: OPS_VERSION for called in self.calls}}.items())
        return parser.parse_function(f'<domain: "{self.domain}", opset_import: [{imports}]>\n{signature} {{{body}}}')
