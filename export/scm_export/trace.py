"""From a PyTorch step to an ONNX graph with a dynamic batch."""

from __future__ import annotations

import logging
import warnings
from contextlib import nullcontext

import torch
from onnxscript import ir

from scm_export.functions import attach_functions, optimize
from scm_export.graphs import BATCH, ir_version
from scm_export.model import Model
from scm_export.ops import operators_as_nodes
from scm_export.parametrisation import Step
from scm_runtime.bundle import Conditioning
from scm_runtime.errors import ExportError

TRACE_BATCH = 2  # sizes 0 and 1 would specialise


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
    step = Step(model.network, model.sigma_data).eval()
    x = torch.zeros(TRACE_BATCH, *model.sample_shape)
    t = torch.full((TRACE_BATCH,), 0.5)
    inputs = {"x": x, "t": t, "t_next": t.clone(), "noise": x.clone()}
    conditioning = {item.name: example(item, TRACE_BATCH) for item in model.conditioning}
    batch = {0: torch.export.Dim(BATCH, min=1, max=2**20)}
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)  # it warns of optional packages that no graph here needs
    try:
        with torch.no_grad(), warnings.catch_warnings(), operators_as_nodes() if operators else nullcontext():
            warnings.simplefilter("ignore")  # deprecations inside torch and onnxscript
            program = torch.onnx.export(
                step,
                kwargs={**inputs, "conditioning": conditioning},
                dynamic_shapes={**dict.fromkeys(inputs, batch), "conditioning": dict.fromkeys(conditioning, batch)},
                input_names=[*inputs, *conditioning],
                output_names=["x_next"],
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            traced: ir.Model = program.model
            optimize(traced)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"torch.onnx cannot translate this network: {reason[-1]}") from error
    finally:
        exporter_log.setLevel(level)
    if missing := {*inputs, *conditioning} - {value.name for value in traced.graph.inputs}:
        raise ExportError(f"the traced step lost its inputs {', '.join(sorted(missing))}")
    _strip(traced)
    traced.ir_version = ir_version(opset)
    attach_functions(traced)
    return traced


def example(item: Conditioning, n: int) -> torch.Tensor:
    """A valid value of a conditioning input for n samples, different for each."""
    if item.kind == "class":
        classes = item.num_classes or 1
        return torch.arange(n) * 7 % classes
    return torch.linspace(1.0, 1.5, n)


def _strip(model: ir.Model) -> None:
    """Leave out what the exporter notes for debugging: stack traces with this machine's paths, and docs."""
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.name = "step"
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
