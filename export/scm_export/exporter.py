"""The whole story of an export: load, build, trace, compose, write, verify."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from onnx import ModelProto
from onnxscript import ir

from scm_export.checkpoints import load_checkpoint
from scm_export.families import build_model
from scm_export.functions import inline_functions
from scm_export.graphs import build_decode, build_noise, compose_sample
from scm_export.model import Model
from scm_export.trace import trace_step
from scm_export.verify import draw_references, verify_bundle
from scm_export.writer import BundleWriter, check_destination, new_bundle
from scm_runtime import __version__
from scm_runtime.bundle import OPS_DOMAIN, OPS_VERSION, SCHEMA_VERSION, Manifest, OutputSpec, SampleSpec, Source, sha256
from scm_runtime.errors import InvalidArgumentError
from scm_runtime.session import load_onnxruntime

OPSETS = range(18, 24)
DEFAULT_OPSET = 20

# The dtypes a bundle's graphs compute in, by the dtype its weights are stored in.
GRAPH_DTYPES: dict[str, tuple[Literal["fp32", "fp16"], ...]] = {"fp32": ("fp32",), "fp16": ("fp16", "fp32")}


@dataclass(frozen=True)
class Options:
    """How to export; see :func:`export`. Raises InvalidArgumentError for a value out of range, MissingDependencyError without ONNX Runtime."""

    dtype: Literal["fp32", "fp16"] = "fp32"
    steps: Sequence[int] | None = None
    opset: int = DEFAULT_OPSET
    force: bool = False
    verify: bool = True
    atol: float | None = None
    progress: Callable[[str], None] = lambda stage: None
    custom_ops: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in GRAPH_DTYPES:
            raise InvalidArgumentError(f"dtype must be one of {', '.join(GRAPH_DTYPES)}, got {self.dtype!r}")
        if self.opset not in OPSETS:
            raise InvalidArgumentError(f"opset must be from {OPSETS[0]} to {OPSETS[-1]}, got {self.opset}")
        if self.atol is not None and not self.atol > 0:
            raise InvalidArgumentError(f"atol must be above 0, got {self.atol}")
        if self.verify:
            load_onnxruntime()  # before minutes of work, not after


@dataclass(frozen=True)
class Exported:
    """A finished bundle."""

    path: Path
    manifest: Manifest


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    dtype: Literal["fp32", "fp16"] = "fp32",
    steps: Sequence[int] | None = None,
    opset: int = DEFAULT_OPSET,
    force: bool = False,
    verify: bool = True,
    atol: float | None = None,
    progress: Callable[[str], None] = lambda stage: None,
    custom_ops: bool = True,
) -> Exported:
    """Turn a checkpoint into a bundle.

    Args:
        checkpoint: a scm-checkpoint, ``.pt`` or ``.safetensors``. No code from it is run.
        out: the bundle's folder; by default the checkpoint's path with the ending ``.scm``.
        dtype: of the stored weights. fp16 gives an fp16 and an fp32 graph over the same half weights.
        steps: step counts to compose whole samplers for, ``sample-K``; each must have times in the checkpoint. None for all that do; may be empty.
        opset: ONNX operator set, 18 to 23.
        force: replace an existing bundle.
        verify: compare the bundle's samples with PyTorch's, at batch 1 and 3, with every step count the model has times for.
        atol: largest absolute difference allowed, in the state's scale; None for the table in ``tolerances.py``.
        progress: called with the name of each stage as it begins.
        custom_ops: keep the operators of docs/custom-ops.md as nodes, with function bodies for runtimes without the library. False puts
            the bodies in their place: standard ONNX, for other runtimes and tools.

    Returns:
        The bundle's path and manifest.

    Raises:
        CheckpointError: the checkpoint cannot be read, or does not fit its family.
        InvalidArgumentError: an option is out of range.
        OutputError: the bundle cannot be written, or exists and force is False.
        VerificationError: the bundle is over tolerance; nothing is left at ``out``.
        ExportError: torch cannot translate the network.
    """
    options = Options(dtype, steps, opset, force, verify, atol, progress, custom_ops)
    source = Path(checkpoint)
    destination = source.with_suffix(".scm") if out is None else Path(out)
    check_destination(destination, force=force)
    progress("reading the checkpoint")
    model = build_model(load_checkpoint(source))
    return export_model(model, destination, Source(file=source.name, sha256=sha256(source)), options)


def export_model(model: Model, destination: Path, source: Source, options: Options) -> Exported:
    """Write and verify the bundle of a model; see :func:`export`. The model is used up: its weights are rounded, written and given back."""
    steps, progress = sorted(set(model.times if options.steps is None else options.steps)), options.progress
    if unknown := sorted(set(steps) - set(model.times)):
        raise InvalidArgumentError(f"steps must be among {sorted(model.times)}, the counts this checkpoint has times for; got {unknown}")
    references = draw_references(model, sorted(model.times), progress) if options.verify else []
    with new_bundle(destination, force=options.force) as writer:
        _write_graphs(writer, model, steps, options)
        parameters = model.parameters
        model.release()  # the weights are on disk; verification needs the memory
        progress("writing")
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=destination.stem,
            producer=f"scm-export {__version__}",
            family=model.family,
            licence=model.licence,
            source=source,
            parameters=parameters,
            sample=SampleSpec(shape=model.sample_shape),
            output=OutputSpec(kind="image", shape=(*model.sample_shape[1:], model.sample_shape[0])),
            sigma_data=model.sigma_data,
            initial_scale=model.initial_scale,
            times={str(count): times for count, times in sorted(model.times.items())},
            conditioning=model.conditioning,
            dtypes=GRAPH_DTYPES[options.dtype],
            weights_dtype=options.dtype,
            opset=options.opset,
            ops={OPS_DOMAIN: OPS_VERSION} if options.custom_ops else {},
            composed_steps=tuple(steps),
            files=writer.close(),
        )
        writer.manifest(manifest)
        if options.verify:
            verification = verify_bundle(writer.folder, manifest, references, options.atol, progress)
            manifest = msgspec.structs.replace(manifest, verification=verification)
            writer.manifest(manifest)
    return Exported(destination, manifest)


def _write_graphs(writer: BundleWriter, model: Model, steps: Sequence[int], options: Options) -> None:
    def write(name: str, graph: ir.Model) -> ModelProto:
        if not options.custom_ops:
            inline_functions(graph)
        return writer.graph(f"{name}.onnx", graph)

    noise = write("noise", build_noise(model.sample_shape, options.opset))
    model.store_as(options.dtype)
    for dtype in GRAPH_DTYPES[options.dtype]:
        options.progress(f"tracing in {dtype}")
        model.compute_in(dtype)
        step = write(f"step.{dtype}", trace_step(model, options.opset))
        decode = write(f"decode.{dtype}", build_decode(model.sample_shape, model.decoder, options.opset))
        for count in steps:
            writer.proto(f"sample-{count}.{dtype}.onnx", compose_sample(model, count, noise, step, decode))
