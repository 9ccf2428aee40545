"""``export`` and ``plan``: prepare the model, trace and compose its graphs, write the bundle, verify it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from onnx import ModelProto
from onnxscript import ir
from torch import nn

from scm_export.choices import GRAPH_DTYPES, QUANTIZED_BITS, TextDtype, text_graph_dtypes
from scm_export.dry_run import Plan, make_plan
from scm_export.graphs.build import build_combine, build_decode, build_noise
from scm_export.graphs.compose import compose_sample
from scm_export.graphs.functions import inline_functions
from scm_export.graphs.quantize import quantize_linear_layers
from scm_export.graphs.trace import TRACE_BATCH, trace_map, trace_step, trace_text
from scm_export.memory import return_freed_memory_to_os
from scm_export.model import ImageNetwork, Model, TextEncoder, compute_in
from scm_export.options import Options, StrPath, options_as_keywords
from scm_export.preparation import composed_steps, graph_opset, prepare
from scm_export.samplers import to_json as samplers_to_json
from scm_export.verification.half_range import fitting_float16
from scm_export.verification.references import compute_references
from scm_export.verification.report import write_report
from scm_export.verification.verify import verify_bundle
from scm_export.writer import BundleWriter, new_bundle
from scm_runtime import __version__
from scm_runtime.bundle.manifest import OPS_DOMAIN, OPS_VERSION, SAMPLERS, SCHEMA_VERSION, Dtype, Manifest, SampleSpec, Source
from scm_runtime.bundle.text_spec import TextSpec


@dataclass(frozen=True)
class Exported:
    """A finished bundle."""

    path: Path
    manifest: Manifest
    notes: tuple[str, ...] = ()
    """What the user should know about assumptions of the export."""


@options_as_keywords(Options)
def export(checkpoint: StrPath | nn.Module, out: StrPath | None, options: Options) -> Exported:
    """Turn a checkpoint into a bundle. The fields of :class:`Options` are the keyword arguments: ``export("model.pt", dtype="fp16", steps=(1, 2))``.

    Args:
        checkpoint: a file or folder, or a repository of the Hugging Face hub, ``"org/name"``; docs/exporting.md lists the formats. No code from it is run
            unless ``trust`` is True. Or a network in memory, described by ``config``; it is copied, and the copy shares its parameters.
        out: folder of the bundle; by default the checkpoint's path with the ending ``.scm``, or a repository's name in the current folder.
            Required for a network in memory.
        options: passed as keyword arguments; see :class:`Options`.

    Returns:
        The bundle's path and manifest.

    Raises:
        CheckpointError: the checkpoint cannot be read, or does not fit its family.
        HubError: the hub has no such repository, or is not available.
        InvalidArgumentError: an option is out of range, or does not fit another option or the model.
        MissingDependencyError: a package is missing, or its installed version is known to fail.
        OutputError: the bundle or the report cannot be written, or the bundle exists and force is False.
        VerificationError: the bundle is over tolerance; nothing is left at ``out``.
        ExportError: torch cannot translate the network.
    """
    return export_model(*prepare(checkpoint, out, options))


def plan(checkpoint: StrPath | nn.Module, out: StrPath | None = None, options: Options | None = None) -> Plan:
    """Describe the bundle that :func:`export` would make. Reads the checkpoint and builds the model; traces nothing and writes nothing.

    An existing bundle is not an error: see ``Plan.exists``.

    Raises the errors of :func:`export` that concern the checkpoint, the options or the destination.
    """
    model, destination, source, options = prepare(checkpoint, out, replace(options or Options(), force=True), dry_run=True)  # an existing bundle is no obstacle
    assert options.dtype is not None
    text_dtype = options.text_dtype or options.dtype
    return make_plan(model, destination, source, options.dtype, text_dtype, composed_steps(model, options), graph_opset(options), custom_ops=options.custom_ops)


def export_model(model: Model, destination: Path, source: Source, options: Options) -> Exported:
    """Write and verify the bundle of a model; see :func:`export`. The model cannot be used afterwards: its weights are rounded, written and released."""
    steps, opset, dtype, progress = composed_steps(model, options), graph_opset(options), options.dtype or "fp32", options.progress
    with fitting_float16(model) if dtype == "fp16" else nullcontext():
        references = compute_references(model, progress) if options.verify else None
    with new_bundle(destination, force=options.force) as writer:
        _write_graphs(writer, model, steps, opset, dtype, options)
        text = None if model.text is None else _write_text(writer, model.text, options.text_dtype or dtype, opset, dtype, options)
        parameters = model.parameters
        model.release()  # the weights are on disk; verification needs the memory
        return_freed_memory_to_os()
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
            output=model.output,
            sigma_data=model.sigma_data,
            initial_scale=model.initial_scale,
            time_unit=model.time_unit,
            times={str(count): times for count, times in sorted(model.times.items())},
            solver=model.solver,
            samplers={name: tuple(sorted(table)) for name, table in model.samplers.items()},
            conditioning=model.conditioning,
            dtypes=GRAPH_DTYPES[dtype],
            weights_dtype=dtype,
            opset=opset,
            ops={OPS_DOMAIN: OPS_VERSION} if options.custom_ops else {},
            composed_steps=tuple(steps),
            text=text,
            files=writer.close(),
        )
        writer.manifest(manifest)
        if references is not None:
            result = verify_bundle(writer.folder, manifest, references, options.atol, progress)
            if options.report is not None:
                write_report(Path(options.report), manifest, result)
            result.require_passed()
            manifest = msgspec.structs.replace(manifest, verification=result.verification)
            writer.manifest(manifest)
    return Exported(destination, manifest, model.notes)


def _write_graphs(writer: BundleWriter, model: Model, steps: Sequence[int], opset: int, weights_dtype: Dtype, options: Options) -> None:
    def write(name: str, graph: ir.Model) -> ModelProto:
        if not options.custom_ops:
            inline_functions(graph)
        return writer.graph(f"{name}.onnx", graph)

    noise = write("noise", build_noise(model.sample_shape, opset))
    if model.samplers:
        write("combine", build_combine(model.sample_shape, opset))
        (writer.folder / SAMPLERS).write_bytes(samplers_to_json(model.samplers))
    model.store_as(weights_dtype)
    x = torch.zeros(TRACE_BATCH, *model.sample_shape)
    for dtype in GRAPH_DTYPES[weights_dtype]:
        options.progress(f"tracing in {dtype}")
        model.compute_in(dtype)
        step = write(f"step.{dtype}", trace_step(model, opset))
        if isinstance(model.decoder, ImageNetwork):
            decode = write(f"decode.{dtype}", trace_map("decode", model.decoder.network, x, "x", "image", opset))
        else:
            decode = write(f"decode.{dtype}", build_decode(model.sample_shape, model.decoder, opset))
        if model.preview is not None:
            write(f"preview.{dtype}", trace_map("preview", model.preview.network, x, "x", "image", opset))
        if model.encoder is not None:
            image = torch.zeros(TRACE_BATCH, *model.encoder.shape, dtype=torch.uint8)
            write(f"encode.{dtype}", trace_map("encode", model.encoder.network, image, "image", "x", opset))
        for count in steps:
            writer.proto(f"sample-{count}.{dtype}.onnx", compose_sample(model, count, noise, step, decode))


def _write_text(writer: BundleWriter, text: TextEncoder, text_dtype: TextDtype, opset: int, weights_dtype: Dtype, options: Options) -> TextSpec:
    """Write the text graphs, in fp32 and in each other dtype that both the bundle and the encoder's weights have, and the tokenizers."""
    for name, contents in text.tokenizers.items():
        (writer.folder / name).write_bytes(contents)
    text.store_as(text_dtype, weights_dtype)
    for dtype in text_graph_dtypes(text_dtype, weights_dtype):
        options.progress(f"tracing the text encoder in {dtype}")
        compute_in(text.network, dtype)
        graph = trace_text(text, opset)
        if text_dtype in QUANTIZED_BITS:
            options.progress(f"quantizing the text encoder to {text_dtype}")
            quantize_linear_layers(graph, QUANTIZED_BITS[text_dtype])
        if not options.custom_ops:
            inline_functions(graph)
        writer.graph(f"text.{dtype}.onnx", graph)
    return msgspec.structs.replace(text.spec, weights_dtype=text_dtype)
