"""From PyTorch modules to ONNX graphs with a dynamic batch."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from onnxscript import ir
from torch import Tensor, nn
from torch.onnx._internal._lazy_import import onnxscript_apis  # type: ignore[attr-defined]  # imported there, not defined

from scm_export.functions import attach_functions, optimize
from scm_export.graphs import BATCH, ir_version
from scm_export.model import Model
from scm_export.ops import operators_as_nodes
from scm_export.products import mark_products
from scm_export.weight_layout import store_as_read
from scm_export.widening import widen
from scm_runtime.bundle.manifest import Conditioning
from scm_runtime.errors import ExportError

TRACE_BATCH = 2  # sizes 0 and 1 would specialise
TRACE_SIZES = 6  # of the first free dimension of a conditioning input, 7 of the second, …: sizes that no other dimension has by chance
LARGEST = 2**20  # of a free dimension

Shape = dict[int, Any]  # free dimensions by axis, torch.export.Dim


def trace_step(model: Model, opset: int, *, operators: bool = True) -> ir.Model:
    """Trace one step of a model's sampler, in the dtype the model computes in now.

    Args:
        model: its weights become the result's: they are not copied.
        opset: ONNX operator set.
        operators: False traces through the functions of ``scm_export.ops`` to torch's own operators, as any exporter would; for comparison.

    Returns:
        The graph, with ``scm`` nodes and their function bodies.

    Raises:
        ExportError: torch cannot translate the network.
    """
    x = torch.zeros(TRACE_BATCH, *model.sample_shape)
    t = torch.full((TRACE_BATCH,), 0.5)
    inputs = {"x": x, "t": t, "t_next": t.clone(), "noise": x.clone()}
    names = sorted({size for item in model.conditioning for size in item.shape if isinstance(size, str)})
    sizes = {name: TRACE_SIZES + i for i, name in enumerate(names)}
    free = {name: torch.export.Dim(name, min=1, max=LARGEST) for name in names}
    batch = torch.export.Dim(BATCH, min=1, max=LARGEST)
    conditioning = {item.name: example(item, TRACE_BATCH, sizes) for item in model.conditioning}
    if model.family == "module":
        with torch.no_grad():  # a table that the network keeps for each dtype is then a real one, not one of the tracer
            model.step(*inputs.values(), conditioning)
    shapes = {item.name: {0: batch, **{axis: free[size] for axis, size in enumerate(item.shape, 1) if isinstance(size, str)}} for item in model.conditioning}
    return _trace(
        "step",
        model.step,
        {**inputs, "conditioning": conditioning},
        {**{name: {0: batch} for name in inputs}, "conditioning": shapes},
        [*inputs, *conditioning],
        "x_next",
        opset,
        operators=operators,
    )


def trace_map(name: str, network: nn.Module, example: Tensor, input: str, output: str, opset: int) -> ir.Model:
    """Trace a network of one input, decoder or encoder, in the dtype it computes in now; ``example`` is a valid input for at least two samples.

    Raises:
        ExportError: torch cannot translate the network.
    """
    batch = torch.export.Dim(BATCH, min=1, max=LARGEST)
    return _trace(name, _OneInput(network), {"input": example}, {"input": {0: batch}}, [input], output, opset)


class _OneInput(nn.Module):
    """Gives a network's input a name of ours, whatever its own argument is called."""

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
    output: str,
    opset: int,
    *,
    operators: bool = True,
) -> ir.Model:
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)  # it warns of optional packages that no graph here needs
    torchlib_ops = _torchlib_ops()
    try:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            operators_as_nodes() if operators else nullcontext(),
            patch.object(onnxscript_apis, "get_torchlib_ops", lambda: torchlib_ops),
        ):
            warnings.simplefilter("ignore")  # deprecations inside torch and onnxscript
            program = torch.onnx.export(
                module.eval(),
                kwargs=dict(arguments),
                dynamic_shapes=dict(shapes),
                input_names=inputs,
                output_names=[output],
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            traced: ir.Model = program.model
            optimize(traced)
            store_as_read(traced)
            if operators:
                mark_products(traced)
            widen(traced)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"torch.onnx cannot translate the network of {name}: {reason[-1]}") from error
    finally:
        exporter_log.setLevel(level)
    if missing := set(inputs) - {value.name for value in traced.graph.inputs}:
        raise ExportError(f"the traced {name} lost its inputs {', '.join(sorted(missing))}")
    if any(value.shape is not None and value.shape.rank() and isinstance(value.shape[0], int) for value in traced.graph.inputs):
        raise ExportError(
            f"torch.onnx fixed the batch of {name} at the {TRACE_BATCH} samples it was traced with. The network uses the batch size as a number: in a loop "
            "over samples, in float(x.shape[0]), or as the length of a table that it keeps. Write that with tensors, or make such a table at every call."
        )
    _strip(traced, name)
    traced.ir_version = ir_version(opset)
    attach_functions(traced)
    return traced


@functools.cache
def _torchlib_ops() -> Any:
    """onnxscript's translations of torch's operators. It parses their sources at each call, which takes a third of a second."""
    return onnxscript_apis.get_torchlib_ops()


def example(item: Conditioning, n: int, sizes: Mapping[str, int] | None = None) -> Tensor:
    """A valid value of a conditioning input for n samples, different for each; ``sizes`` are those of its free dimensions."""
    shape = [(sizes or {}).get(size, TRACE_SIZES) if isinstance(size, str) else size for size in item.shape]
    match item.kind:
        case "class":
            return torch.arange(n) * 7 % (item.num_classes or 1)
        case "scalar":
            return torch.linspace(1.0, 1.5, n) * (item.default or 1.0)  # a default of 0 is no measure
        case "embedding":
            return torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))
        case "mask":  # one token less for each further sample
            kept = torch.arange(shape[-1]) < (shape[-1] - torch.arange(n)).clamp(min=1).reshape(-1, *(1,) * len(shape))
            return kept.expand(n, *shape).to(torch.int64)


def _strip(model: ir.Model, name: str) -> None:
    """Leave out what the exporter notes for debugging: stack traces with this machine's paths, and docs."""
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
