"""The whole story of an export: load, build, trace, compose, write, verify."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from onnx import ModelProto
from onnxscript import ir

from scm_export.checkpoints import DiffusersFolder, load
from scm_export.families import FAMILIES, BuildOptions, build_model, find_family
from scm_export.families.family import Dtype
from scm_export.functions import inline_functions
from scm_export.graphs import build_decode, build_noise, compose_sample
from scm_export.model import ImageNetwork, Model
from scm_export.trace import TRACE_BATCH, trace_map, trace_step
from scm_export.verify import draw_references, verify_bundle
from scm_export.writer import BundleWriter, check_destination, new_bundle
from scm_runtime import __version__
from scm_runtime.bundle import OPS_DOMAIN, OPS_VERSION, SCHEMA_VERSION, Manifest, SampleSpec, Source, sha256
from scm_runtime.errors import InvalidArgumentError
from scm_runtime.session import load_onnxruntime

OPSETS = range(18, 24)
DEFAULT_OPSET = {"fp32": 20, "fp16": 20, "bf16": 22}  # Conv has taken bfloat16 since 22

# The dtypes a bundle's graphs compute in, by the dtype its weights are stored in.
GRAPH_DTYPES: dict[str, tuple[Dtype, ...]] = {"fp32": ("fp32",), "fp16": ("fp16", "fp32"), "bf16": ("bf16", "fp32")}


@dataclass(frozen=True)
class Options:
    """How to export; see :func:`export`. Raises InvalidArgumentError for a value out of range, MissingDependencyError without ONNX Runtime."""

    dtype: Dtype = "fp32"
    steps: Sequence[int] | None = None
    opset: int | None = None
    force: bool = False
    verify: bool = True
    atol: float | None = None
    progress: Callable[[str], None] = lambda stage: None
    custom_ops: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in GRAPH_DTYPES:
            raise InvalidArgumentError(f"dtype must be one of {', '.join(GRAPH_DTYPES)}, got {self.dtype!r}")
        lowest = DEFAULT_OPSET[self.dtype] if self.dtype == "bf16" else OPSETS[0]
        if self.opset is not None and self.opset not in range(lowest, OPSETS[-1] + 1):
            raise InvalidArgumentError(f"opset must be from {lowest} to {OPSETS[-1]} for {self.dtype}, got {self.opset}")
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
    family: str | None = None,
    dtype: Dtype | None = None,
    decoder: str | os.PathLike[str] | None = None,
    latents: bool = False,
    with_encoder: bool = False,
    preview_decoder: str | os.PathLike[str] | None = None,
    size: tuple[int, int] | None = None,
    steps: Sequence[int] | None = None,
    opset: int | None = None,
    force: bool = False,
    verify: bool = True,
    atol: float | None = None,
    progress: Callable[[str], None] = lambda stage: None,
    custom_ops: bool = True,
) -> Exported:
    """Turn a checkpoint into a bundle.

    Args:
        checkpoint: a file or folder; README has the table of formats. No code from it is run.
        out: the bundle's folder; by default the checkpoint's path with the ending ``.scm``.
        family: how to read the checkpoint, one of ``scm_export.families.FAMILIES``; None: found from the checkpoint itself.
        dtype: of the stored weights, "fp32", "fp16" or "bf16"; None for the family's default. The last two give a graph in that dtype and an
            fp32 graph over the same half weights.
        decoder: folder of an autoencoder as diffusers saves it, for models of latents whose checkpoint brings none.
        latents: leave the decoder out; the bundle's samples are latents.
        with_encoder: also write the autoencoder's encoder, ``encode.*.onnx``.
        preview_decoder: folder of a small autoencoder (AutoencoderTiny), written as ``preview.*.onnx``.
        size: height and width of the images, pixels; None for the checkpoint's own.
        steps: step counts to compose whole samplers for, ``sample-K``; each must have times in the checkpoint. None for all that do; may be empty.
        opset: ONNX operator set, 18 to 23; None for 20, or 22 for bf16, which needs it.
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
    source = Path(checkpoint)
    destination = source.with_suffix(".scm") if out is None else Path(out)
    options = Options(dtype or "fp32", steps, opset, force, verify, atol, progress, custom_ops)
    check_destination(destination, force=force)
    progress("reading the checkpoint")
    loaded = load(source)
    name = find_family(loaded, family)
    options = replace(options, dtype=dtype or FAMILIES[name].dtype)
    decoder_folder, preview_folder = (None if path is None else Path(path) for path in (decoder, preview_decoder))
    model = build_model(loaded, BuildOptions(decoder_folder, latents, with_encoder, preview_folder, size), name)
    fingerprint = loaded.fingerprint() if isinstance(loaded, DiffusersFolder) else sha256(source)
    return export_model(model, destination, Source(file=source.name, sha256=fingerprint), options)


def export_model(model: Model, destination: Path, source: Source, options: Options) -> Exported:
    """Write and verify the bundle of a model; see :func:`export`. The model is used up: its weights are rounded, written and given back."""
    steps, progress = sorted(set(model.times if options.steps is None else options.steps)), options.progress
    if unknown := sorted(set(steps) - set(model.times)):
        raise InvalidArgumentError(f"steps must be among {sorted(model.times)}, the counts this checkpoint has times for; got {unknown}")
    references = draw_references(model, sorted(model.times), progress) if options.verify else []
    opset = options.opset or DEFAULT_OPSET[options.dtype]
    with new_bundle(destination, force=options.force) as writer:
        _write_graphs(writer, model, steps, opset, options)
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
            output=model.output,
            sigma_data=model.sigma_data,
            initial_scale=model.initial_scale,
            time_unit=model.time_unit,
            times={str(count): times for count, times in sorted(model.times.items())},
            conditioning=model.conditioning,
            dtypes=GRAPH_DTYPES[options.dtype],
            weights_dtype=options.dtype,
            opset=opset,
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


def _write_graphs(writer: BundleWriter, model: Model, steps: Sequence[int], opset: int, options: Options) -> None:
    def write(name: str, graph: ir.Model) -> ModelProto:
        if not options.custom_ops:
            inline_functions(graph)
        return writer.graph(f"{name}.onnx", graph)

    noise = write("noise", build_noise(model.sample_shape, opset))
    model.store_as(options.dtype)
    x = torch.zeros(TRACE_BATCH, *model.sample_shape)
    for dtype in GRAPH_DTYPES[options.dtype]:
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
