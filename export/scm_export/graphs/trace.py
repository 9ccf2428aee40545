"""Tracing of PyTorch modules into ONNX graphs with a dynamic batch size."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from onnxscript import ir
from torch import Tensor, nn

from scm_export.errors import ExportError
from scm_export.example_inputs import EXAMPLE_SIZE, example_conditioning
from scm_export.graphs.attention import attention_translations, share_masks
from scm_export.graphs.bf16_casts import insert_float32_casts
from scm_export.graphs.build import BATCH, ir_version
from scm_export.graphs.constant_shapes import use_constant_shapes
from scm_export.graphs.dense_layers import replace_dense_layers
from scm_export.graphs.functions import attach_functions, optimize
from scm_export.graphs.norms import norm_translations, replace_norms
from scm_export.graphs.trace_errors import explain, fixed_batch, quiet_tracer
from scm_export.graphs.transformer_blocks import replace_transformer_blocks
from scm_export.graphs.weight_layout import fold_weight_transposes
from scm_export.model import Model, TextEncoder
from scm_export.ops import operators_as_nodes

TRACE_BATCH = 2  # torch.export would specialize the graph for sizes 0 and 1
MAX_SIZE = 2**20  # of a dynamic dimension


def trace_step(model: Model, opset: int, *, operators: bool = True) -> ir.Model:
    """Trace one step of a model's sampler, in the model's current compute dtype.

    Args:
        model: the graph refers to its weights without copying them.
        opset: ONNX operator set.
        operators: False traces the functions of ``scm_export.ops`` as the torch operators that they consist of, for comparison.

    Returns:
        The graph, with ``scm`` nodes and their function bodies.

    Raises:
        ExportError: torch cannot translate the network.
    """
    x = torch.zeros(TRACE_BATCH, *model.sample_shape)
    t = torch.full((TRACE_BATCH,), 0.5)
    inputs = {"x": x, "t": t, "t_next": t.clone(), "noise": x.clone()}
    names = sorted({size for item in model.conditioning for size in item.shape if isinstance(size, str)})
    sizes = {name: EXAMPLE_SIZE + i for i, name in enumerate(names)}
    dynamic = {name: torch.export.Dim(name, min=1, max=MAX_SIZE) for name in names}
    batch = torch.export.Dim(BATCH, min=1, max=MAX_SIZE)
    conditioning = {item.name: example_conditioning(item, TRACE_BATCH, sizes) for item in model.conditioning}
    if model.family == "module":
        with torch.no_grad():  # a table that the network caches for each dtype then holds real tensors instead of the tracer's
            model.step(*inputs.values(), conditioning)
    shapes = {item.name: {0: batch, **{axis: dynamic[size] for axis, size in enumerate(item.shape, 1) if isinstance(size, str)}} for item in model.conditioning}
    return _trace(
        "step",
        model.step,
        {**inputs, "conditioning": conditioning},
        {**{name: {0: batch} for name in inputs}, "conditioning": shapes},
        [*inputs, *conditioning],
        ["x_next"],
        opset,
        operators=operators,
    )


def trace_map(name: str, network: nn.Module, example: Tensor, input: str, output: str, opset: int) -> ir.Model:
    """Trace a network with one input, such as a decoder or an encoder, in its current compute dtype.

    Args:
        name: of the graph.
        network: called with one tensor.
        example: a valid input for at least two samples.
        input: name of the graph's input.
        output: name of the graph's output.
        opset: ONNX operator set.

    Raises:
        ExportError: torch cannot translate the network.
    """
    batch = torch.export.Dim(BATCH, min=1, max=MAX_SIZE)
    return _trace(name, _OneInput(network), {"input": example}, {"input": {0: batch}}, [input], [output], opset)


def trace_text(text: TextEncoder, opset: int) -> ir.Model:
    """Trace the networks of a text encoder in their current compute dtype. The graph has the inputs and outputs that the encoder names.

    Raises:
        ExportError: torch cannot translate a network.
    """
    batch = torch.export.Dim(BATCH, min=1, max=MAX_SIZE)
    inputs = {name: torch.ones(TRACE_BATCH, length, dtype=torch.int64) for name, length in text.inputs.items()}
    shapes = {name: {0: batch} for name in inputs}
    return _trace("text", _NamedInputs(text.network), {"inputs": inputs}, {"inputs": shapes}, list(inputs), list(text.spec.outputs), opset)


class _NamedInputs(nn.Module):
    """A network whose inputs have names that its own ``forward`` does not."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.network(*inputs.values())
        return outputs


class _OneInput(nn.Module):
    """A network whose argument is called ``input``, whatever the name in its own ``forward``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.network(input)
        return y


def _trace(
    name: str,
    module: nn.Module,
    arguments: Mapping[str, Any],
    shapes: Mapping[str, Any],
    inputs: list[str],
    outputs: list[str],
    opset: int,
    *,
    operators: bool = True,
) -> ir.Model:
    module = module.eval()
    try:
        with quiet_tracer(), _tracing(operators=operators):
            program = torch.onnx.export(
                module,
                kwargs=dict(arguments),
                dynamic_shapes=dict(shapes),
                input_names=inputs,
                output_names=outputs,
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
                custom_translation_table={**attention_translations(), **norm_translations()} if operators else None,
            )
            assert program is not None
            traced: ir.Model = program.model
            optimize(traced)
            use_constant_shapes(traced)
            fold_weight_transposes(traced)
            if operators:
                replace_transformer_blocks(traced)
                replace_norms(traced)
                share_masks(traced)
                replace_dense_layers(traced)
            insert_float32_casts(traced)
            # ONNX Runtime warns of every unused initializer, such as the shape of a Reshape that was removed.
            ir.passes.common.RemoveUnusedNodesPass()(traced)
    except Exception as error:
        raise ExportError(explain(error, name)) from error
    if missing := set(inputs) - {value.name for value in traced.graph.inputs}:
        raise ExportError(f"the traced {name} lost its inputs {', '.join(sorted(missing))}")
    if any(value.shape is not None and value.shape.rank() and isinstance(value.shape[0], int) for value in traced.graph.inputs):

        def trace_again() -> object:
            with _tracing(operators=operators):
                return torch.export.export(module, (), kwargs=dict(arguments), dynamic_shapes=dict(shapes))

        raise ExportError(fixed_batch(name, TRACE_BATCH, trace_again))
    _strip(traced, name)
    traced.ir_version = ir_version(opset)
    attach_functions(traced)
    return traced


@contextmanager
def _tracing(*, operators: bool) -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings(), operators_as_nodes() if operators else nullcontext():
        warnings.simplefilter("ignore")  # deprecations inside torch and onnxscript
        yield


def _strip(model: ir.Model, name: str) -> None:
    """Remove the debugging metadata that torch adds: doc strings, and stack traces with paths of this machine."""
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.name = name
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
