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

from scm_export.checkpoints import DiffusersFolder, open_checkpoint
from scm_export.checkpoints.from_hub import fetch
from scm_export.choices import DEFAULT_OPSET, GRAPH_DTYPES, MAX_COMPOSED_STEPS, MIN_OPSET, OPSETS, ParametrisationName
from scm_export.dry_run import Plan, make_plan
from scm_export.families import FAMILIES, BuildOptions, build_model, find_family
from scm_export.graphs.build import build_combine, build_decode, build_noise
from scm_export.graphs.compose import compose_sample
from scm_export.graphs.functions import inline_functions
from scm_export.graphs.trace import TRACE_BATCH, trace_map, trace_step
from scm_export.memory import return_freed_memory_to_os
from scm_export.model import ImageDecoder, ImageNetwork, Latents, Model
from scm_export.samplers import to_json as samplers_to_json
from scm_export.verification.references import compute_references
from scm_export.verification.report import check_report_path, write_report
from scm_export.verification.verify import verify_bundle
from scm_export.versions import check_versions, warn_about_untested_versions
from scm_export.writer import BundleWriter, check_destination, new_bundle
from scm_runtime import __version__
from scm_runtime.bundle.manifest import OPS_DOMAIN, OPS_VERSION, SAMPLERS, SCHEMA_VERSION, Dtype, Manifest, SampleSpec, Source, sha256
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.errors import InvalidArgumentError

StrPath = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to export; see :func:`export`. Raises InvalidArgumentError for a value out of range, MissingDependencyError without ONNX Runtime."""

    revision: str | None = None
    family: str | None = None
    config: StrPath | None = None
    factory: str | None = None
    weights: str | None = None
    parametrisation: ParametrisationName | None = None
    trust: bool = False
    dtype: Dtype | None = None
    decoder: StrPath | None = None
    latents: bool = False
    with_encoder: bool = False
    preview_decoder: StrPath | None = None
    guide: StrPath | None = None
    size: tuple[int, int] | None = None
    steps: Sequence[int] | None = None
    opset: int | None = None
    custom_ops: bool = True
    force: bool = False
    verify: bool = True
    atol: float | None = None
    report: StrPath | None = None
    progress: Callable[[str], None] = lambda stage: None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in GRAPH_DTYPES:
            raise InvalidArgumentError(f"dtype must be one of {', '.join(GRAPH_DTYPES)}, got {self.dtype!r}")
        dtype = self.dtype or "fp32"
        if self.opset is not None and self.opset not in range(MIN_OPSET[dtype], OPSETS[-1] + 1):
            raise InvalidArgumentError(f"opset must be from {MIN_OPSET[dtype]} to {OPSETS[-1]} for {dtype}, got {self.opset}")
        if self.atol is not None and not self.atol > 0:
            raise InvalidArgumentError(f"atol must be above 0, got {self.atol}")
        if self.size is not None and min(self.size) < 1:
            raise InvalidArgumentError(f"size must be a height and a width of at least 1, got {self.size[0]}x{self.size[1]}")
        if self.latents and self.decoder is not None and not self.with_encoder:
            raise InvalidArgumentError("latents leaves the decoder out, but a decoder was given: give one of them (or with_encoder, which is read from it)")
        if self.report is not None and not self.verify:
            raise InvalidArgumentError("a report tells of the verification, which is left out: give one of them")
        if self.verify:
            load_onnxruntime()  # before minutes of work, not after


@dataclass(frozen=True)
class Exported:
    """A finished bundle."""

    path: Path
    manifest: Manifest


def export(
    checkpoint: StrPath,
    out: StrPath | None = None,
    *,
    revision: str | None = None,
    family: str | None = None,
    config: StrPath | None = None,
    factory: str | None = None,
    weights: str | None = None,
    parametrisation: ParametrisationName | None = None,
    trust: bool = False,
    dtype: Dtype | None = None,
    decoder: StrPath | None = None,
    latents: bool = False,
    with_encoder: bool = False,
    preview_decoder: StrPath | None = None,
    guide: StrPath | None = None,
    size: tuple[int, int] | None = None,
    steps: Sequence[int] | None = None,
    opset: int | None = None,
    custom_ops: bool = True,
    force: bool = False,
    verify: bool = True,
    atol: float | None = None,
    report: StrPath | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Exported:
    """Turn a checkpoint into a bundle.

    Args:
        checkpoint: a file or folder, or a repository of the Hugging Face hub, ``"org/name"``; README has the table of formats. No code from it is run
            unless ``trust``.
        out: the bundle's folder; by default the checkpoint's path with the ending ``.scm``, of a repository its name in the current folder.
        revision: of a repository: branch, tag or commit; None for the main branch.
        family: how to read the checkpoint, one of ``scm_export.families.FAMILIES``; None: found from the checkpoint itself.
        config: TOML or JSON file that says what bare tensors or a program are: family, configuration, sampler, conditioning (docs/checkpoint-format.md).
        factory: ``package.module:function``, for the family "module": returns the network that the checkpoint's tensors are loaded into. It is run, and
            looked for in the current folder too.
        weights: dotted key of the set of weights to export, where a training checkpoint holds several (``"ema"``), or name of a network in an EDM2 pickle.
            None: the only one, or of several the only one that its key names as a moving average. The manifest records which.
        parametrisation: what the network predicts, in place of what checkpoint or config say; one of ``scm_export.choices.PARAMETRISATION_NAMES``.
        trust: also open what can only be opened by running code from it: TorchScript, pickled modules, unusual ``.pt2`` files.
        dtype: of the stored weights, "fp32", "fp16" or "bf16"; None for the family's default. The last two give a graph in that dtype and an
            fp32 graph over the same half weights.
        decoder: folder (or repository) of an autoencoder as diffusers saves it, for models of latents whose checkpoint brings none.
        latents: leave the decoder out; the bundle's samples are latents.
        with_encoder: also write the autoencoder's encoder, ``encode.*.onnx``.
        preview_decoder: folder (or repository) of a small autoencoder (AutoencoderTiny), written as ``preview.*.onnx``.
        guide: checkpoint of a worse version of a diffusion model (smaller, less trained, without classes): autoguidance, with ``guidance_scale`` as an
            input of the bundle. For the family edm2. ``weights`` is not for it: it must hold one set.
        size: height and width of the images, pixels; None for the checkpoint's own.
        steps: step counts to compose whole samplers for, ``sample-K``; each must have times in the checkpoint. None for those up to 4,
            or else the smallest; may be empty.
        opset: ONNX operator set, 18 to 23; None for 20, or 22 for bf16, which needs it.
        custom_ops: keep the operators of docs/custom-ops.md as nodes, with function bodies for runtimes without the library. False puts
            the bodies in their place: standard ONNX, for other runtimes and tools.
        force: replace an existing bundle.
        verify: compare the bundle with the original's own sampler: what ``scm_export.verification.references`` lists.
        atol: largest absolute difference allowed, in the state's scale; None for the table in ``tolerances.py``.
        report: HTML file for the verification, with pictures; written too when the bundle fails it.
        progress: called with the name of each stage as it begins.

    Returns:
        The bundle's path and manifest.

    Raises:
        CheckpointError: the checkpoint cannot be read, or does not fit its family.
        HubError: the hub has no such repository, or cannot be asked.
        InvalidArgumentError: an option is out of range, or does not fit another one or the model.
        MissingDependencyError: a package is missing, or installed in a version that is known to fail.
        OutputError: the bundle or the report cannot be written, or the bundle exists and force is False.
        VerificationError: the bundle is over tolerance; nothing is left at ``out``.
        ExportError: torch cannot translate the network.
    """
    options = Options(
        revision=revision,
        family=family,
        config=config,
        factory=factory,
        weights=weights,
        parametrisation=parametrisation,
        trust=trust,
        dtype=dtype,
        decoder=decoder,
        latents=latents,
        with_encoder=with_encoder,
        preview_decoder=preview_decoder,
        guide=guide,
        size=size,
        steps=steps,
        opset=opset,
        custom_ops=custom_ops,
        force=force,
        verify=verify,
        atol=atol,
        report=report,
        progress=progress,
    )
    return export_with(checkpoint, out, options)


def export_with(checkpoint: StrPath, out: StrPath | None, options: Options) -> Exported:
    """:func:`export`, the options in one object."""
    return export_model(*_prepare(checkpoint, out, options))


def plan(checkpoint: StrPath, out: StrPath | None = None, options: Options | None = None) -> Plan:
    """What :func:`export` would make: reads the checkpoint and builds the model, traces nothing and writes nothing. Raises what it raises until there."""
    model, destination, source, resolved = _prepare(checkpoint, out, options or Options())
    assert resolved.dtype is not None
    return make_plan(model, destination, source, resolved.dtype, _steps(model, resolved), _opset(resolved), custom_ops=resolved.custom_ops)


def _prepare(checkpoint: StrPath, out: StrPath | None, options: Options) -> tuple[Model, Path, Source, Options]:
    """The model, where its bundle goes, what it is made from, and the options with the dtype settled."""
    check_versions()
    warn_about_untested_versions()
    found = fetch(checkpoint, options.revision, options.progress)
    path = found.path
    destination = found.bundle if out is None else Path(out)
    check_destination(destination, force=options.force)
    if options.report is not None:
        check_report_path(Path(options.report), destination)
    options.progress("reading the checkpoint")
    given = {name: getattr(options, name) for name in ("trust", "config", "factory", "weights", "parametrisation", "progress")}
    loaded, weights = open_checkpoint(path, **given)
    name = find_family(loaded, options.family)
    options = replace(options, dtype=options.dtype or FAMILIES[name].dtype)
    assert options.dtype is not None
    if reason := FAMILIES[name].refuses.get(options.dtype):
        raise InvalidArgumentError(f"the family {name} cannot be exported in {options.dtype}: {reason}")
    decoder, preview = (None if given is None else fetch(given, None, options.progress).path for given in (options.decoder, options.preview_decoder))
    guide = None if options.guide is None else open_checkpoint(Path(options.guide), trust=options.trust, progress=options.progress)
    build = BuildOptions(decoder, options.latents, options.with_encoder, preview, None if guide is None else guide.checkpoint, options.size)
    model = build_model(loaded, build, name)
    _check_use(model, options)
    fingerprint = loaded.fingerprint() if isinstance(loaded, DiffusersFolder) else sha256(path)
    if options.guide is None or guide is None:
        guided_by = None
    else:
        guided_by = Source(file=Path(options.guide).name, sha256=sha256(Path(options.guide)), weights=guide.weights)
    return model, destination, Source(file=found.name, sha256=fingerprint, weights=weights, guide=guided_by), options


def _check_use(model: Model, options: Options) -> None:
    """Refuse options that a model has no use for: they were meant to change the bundle. Raises InvalidArgumentError."""
    own_pixels = isinstance(model.decoder, ImageDecoder)
    unused = {
        "decoder": options.decoder is not None and own_pixels,
        "latents": options.latents and not isinstance(model.decoder, Latents),
        "with_encoder": options.with_encoder and model.encoder is None,
        "preview_decoder": options.preview_decoder is not None and model.preview is None,
        "guide": options.guide is not None and model.family != "edm2",
    }
    if names := [name for name, given in unused.items() if given]:
        why = "the samples of this model are pixels, not latents" if own_pixels and names[0] != "guide" else f"the family {model.family} has no use for it"
        raise InvalidArgumentError(f"{names[0]} was given, but {why}. Leave it out.")
    shape = model.output.shape
    if options.size is not None and model.output.kind == "image" and shape[:2] != options.size:
        raise InvalidArgumentError(f"size must be this model's own, {shape[0]}x{shape[1]}, got {options.size[0]}x{options.size[1]}")


def _steps(model: Model, options: Options) -> list[int]:
    """Of the composed samplers; raises InvalidArgumentError for a count that has no times."""
    few = [count for count in model.times if count <= MAX_COMPOSED_STEPS] or [min(model.times)]
    steps = sorted(set(few if options.steps is None else options.steps))
    if unknown := sorted(set(steps) - set(model.times)):
        raise InvalidArgumentError(f"steps must be among {sorted(model.times)}, the counts this checkpoint has times for; got {unknown}")
    return steps


def _opset(options: Options) -> int:
    return options.opset or DEFAULT_OPSET[options.dtype or "fp32"]


def export_model(model: Model, destination: Path, source: Source, options: Options) -> Exported:
    """Write and verify the bundle of a model; see :func:`export`. The model is used up: its weights are rounded, written and given back."""
    steps, opset, dtype, progress = _steps(model, options), _opset(options), options.dtype or "fp32", options.progress
    references = compute_references(model, progress) if options.verify else None
    with new_bundle(destination, force=options.force) as writer:
        _write_graphs(writer, model, steps, opset, dtype, options)
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
            files=writer.close(),
        )
        writer.manifest(manifest)
        if references is not None:
            outcome = verify_bundle(writer.folder, manifest, references, options.atol, progress)
            if options.report is not None:
                write_report(Path(options.report), manifest, outcome)
            outcome.require_passed()
            manifest = msgspec.structs.replace(manifest, verification=outcome.verification)
            writer.manifest(manifest)
    return Exported(destination, manifest)


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
