"""What the operators of the domain ``scm`` have in common: how they appear in a trace, and how their ONNX function bodies are made.

The contract of all of them is docs/custom-ops.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from onnx import FunctionProto, parser
from torch import Tensor

from scm_runtime.bundle.manifest import OPS_DOMAIN, OPS_VERSION

_emits_nodes = ContextVar("emits_nodes", default=False)


@contextmanager
def operators_as_nodes() -> Iterator[None]:
    """Within the block the functions of ``scm_export.ops`` become nodes of their operators; for torch.onnx.export, not for results."""
    token = _emits_nodes.set(True)
    try:
        yield
    finally:
        _emits_nodes.reset(token)


def emits_nodes() -> bool:
    """Whether a function of ``scm_export.ops`` is to become a node."""
    # torch.compile cannot read a ContextVar, and would break the graph at every operator.
    return not torch.compiler.is_dynamo_compiling() and _emits_nodes.get()


def silu_statements(x: str, y: str) -> str:
    """``y = silu(x) / 0.596``, in ONNX's textual syntax: what MPSiLU and every second output are."""
    return f"""
        {y}_sigmoid = Sigmoid ({x})
        {y}_silu = Mul ({x}, {y}_sigmoid)
        {y}_rms = Constant <value_float = 0.596> ()
        {y}_divisor = CastLike ({y}_rms, {x})
        {y} = Div ({y}_silu, {y}_divisor)
    """


def balance_statements(a: str, b: str) -> str:
    """``a = (1-t) / sqrt((1-t)^2 + t^2)`` and ``b = t / sqrt((1-t)^2 + t^2)``, from the attribute t; leaves ``one`` behind."""
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

    The statements are ONNX's textual syntax; attributes are referred to as ``@name``. ``{inner_axes}`` stands for the axes between the first
    and the last of the first input and ``{sample_axes}`` for all but the first: computed in the graph, they would cost ONNX Runtime the
    shapes behind them and a copy of the feature map, so a body is made for one rank.
    """

    domain: str = OPS_DOMAIN
    name: str
    inputs: dict[str, str]
    """Their types: T, which is one type in a node, or an ONNX type's name."""
    output: str
    output_type: str
    body: str
    attributes: tuple[str, ...] = ()
    activated: bool = False
    """Whether there is an optional second output, ``mp_silu`` of the first."""

    def node(
        self, *inputs: Tensor, outputs: int = 1, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None, **attributes: float
    ) -> Sequence[Tensor]:
        """A node in the graph that is being traced; its outputs have the first input's dtype and shape unless others are given."""
        like = inputs[0]
        shapes = [like.shape if shape is None else shape] * outputs
        return torch.onnx.ops.symbolic_multi_out(
            f"{self.domain}::{self.name}", inputs, {**attributes}, dtypes=[dtype or like.dtype] * outputs, shapes=shapes, version=OPS_VERSION
        )

    def output_names(self, outputs: int) -> list[str]:
        """Names of the first one or two outputs."""
        return [self.output, "activated"][:outputs]

    def function(self, opset: int, rank: int, outputs: int = 1) -> FunctionProto:
        """The function body for nodes of one rank and number of outputs."""
        names = self.output_names(outputs)
        body = self.body + (silu_statements(names[0], "activated") if outputs == 2 else "")
        for placeholder, axes in (("{inner_axes}", range(1, rank - 1)), ("{sample_axes}", range(1, rank))):
            body = body.replace(placeholder, str(list(axes)))
        attributes = f"<{', '.join(self.attributes)}>" if self.attributes else ""
        signature = f"{self.name} {attributes} ({', '.join(self.inputs)}) => ({', '.join(names)})"
        return parser.parse_function(f'<domain: "{self.domain}", opset_import: ["": {opset}]>\n{signature} {{{body}}}')
