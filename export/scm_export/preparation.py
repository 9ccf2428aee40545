"""What precedes an export: find and read the checkpoint, build its model, and check the options against both."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from scm_export.checkpoints import DiffusersFolder, Loaded, open_checkpoint, open_network
from scm_export.checkpoints.from_hub import fetch
from scm_export.checkpoints.program import FACTORY, call_factory, copy_network, weights_sha256
from scm_export.choices import DEFAULT_OPSET, LARGEST_SAMPLER, MAX_COMPOSED_STEPS
from scm_export.errors import CheckpointError
from scm_export.families import FAMILIES, BuildOptions, build_model, find_family
from scm_export.lora import Lora, open_lora, parse_lora
from scm_export.model import ImageDecoder, Latents, Model
from scm_export.options import Options, StrPath
from scm_export.verification.report import check_report_path
from scm_export.versions import check_versions, warn_about_untested_versions
from scm_export.writer import check_destination
from scm_runtime.bundle.checksums import sha256
from scm_runtime.bundle.manifest import Source
from scm_runtime.errors import InvalidArgumentError

SD_DISTILLED = "sd-distilled"
OF_LATENTS = ("decoder", "latents", "with_encoder", "preview_decoder")  # options
LATENT_OR_RGBA = 4  # channels of RGBA pixels and of the latents of many autoencoders


class Prepared(NamedTuple):
    """A model that is ready to be exported."""

    model: Model
    destination: Path
    source: Source
    options: Options
    """The given options, with a dtype."""


class Opened(NamedTuple):
    """A checkpoint or network, and where its bundle will be."""

    loaded: Loaded
    destination: Path
    name: str
    """Name for the manifest."""
    weights: str | None
    fingerprint: Callable[[], str]
    """Computes the SHA-256 for the manifest, which takes time for large files."""


def prepare(checkpoint: StrPath | nn.Module, out: StrPath | None, options: Options, *, dry_run: bool = False) -> Prepared:
    """Read a checkpoint and build its model; in a ``dry_run`` without the test of its parametrization.

    Raises what :func:`scm_export.export` raises for a checkpoint, an option or a destination.
    """
    check_versions()
    warn_about_untested_versions()
    if not isinstance(checkpoint, nn.Module | str | os.PathLike):
        raise InvalidArgumentError(f"checkpoint must be a path or a torch.nn.Module, got {checkpoint if isinstance(checkpoint, type) else type(checkpoint)!r}")
    opened = _open_network(checkpoint, out, options) if isinstance(checkpoint, nn.Module) else _open_path(checkpoint, out, options)
    loaded = opened.loaded
    family = find_family(loaded, options.family)
    options = replace(options, dtype=options.dtype or FAMILIES[family].dtype)
    assert options.dtype is not None
    if reason := FAMILIES[family].refuses.get(options.dtype):
        raise InvalidArgumentError(f"the family {family} cannot be exported in {options.dtype}: {reason}")
    loras = _open_loras(family, options)
    preview = None if options.preview_decoder is None else fetch(options.preview_decoder, None, options.progress).path
    guide, guide_weights = None, None
    if options.guide is not None:
        guide, guide_weights = open_checkpoint(options.guide, trust=options.trust, progress=options.progress)
    same = {name: getattr(options, name) for name in ("latents", "with_encoder", "scheduler", "prediction_type", "guidance", "size", "text")}
    build_options = BuildOptions(_decoder(options), preview_decoder=preview, guide=guide, loras=loras, test_parametrisation=not dry_run, **same)
    model = build_model(loaded, build_options, family)
    model.notes += tuple(_lora_notes(loras))
    _check_options_apply(model, options)
    if isinstance(model.decoder, ImageDecoder) and model.sample_shape[0] == LATENT_OR_RGBA:
        model.notes += ("the state has 4 channels and is taken as RGBA pixels. If it is latents, give their autoencoder with --decoder, or --latents",)
    guide_source = None
    if options.guide is not None:  # a file: build_model refuses guides in folders
        guide_source = Source(file=Path(options.guide).name, sha256=sha256(Path(options.guide)), weights=guide_weights)
    source = Source(file=opened.name, sha256=opened.fingerprint(), weights=opened.weights, guide=guide_source, loras=tuple(lora.source for lora in loras))
    return Prepared(model, opened.destination, source, options)


def _open_path(checkpoint: StrPath, out: StrPath | None, options: Options) -> Opened:
    found = fetch(checkpoint, options.revision, options.progress, text=options.text)
    path, destination = found.path, found.bundle if out is None else Path(out)
    _check_output(destination, options)
    options.progress("reading the checkpoint")
    read_options = {name: getattr(options, name) for name in ("trust", "config", "factory", "weights", "parametrisation", "progress")}
    loaded, weights = open_checkpoint(path, **read_options)
    return Opened(loaded, destination, found.name, weights, loaded.fingerprint if isinstance(loaded, DiffusersFolder) else lambda: sha256(path))


def _open_network(network: nn.Module, out: StrPath | None, options: Options) -> Opened:
    if unused := [name for name in ("revision", "factory", "weights") if getattr(options, name) is not None]:
        raise InvalidArgumentError(f"{unused[0]} was given, but it is for files, not for a network in memory. Leave it out.")
    if out is None:
        raise InvalidArgumentError("out, the folder of the bundle, must be given for a network in memory: it has no path that a name could follow from")
    _check_output(Path(out), options)
    program = open_network(network, options.config, options.parametrisation)
    return Opened(program, Path(out), type(network).__qualname__, None, lambda: weights_sha256(network))


def _decoder(options: Options) -> Path | nn.Module | None:
    """Folder of an autoencoder, or the user's own decoder."""
    given = options.decoder
    if given is None:
        return None
    if isinstance(given, nn.Module):
        return copy_network(given, f"the decoder {type(given).__name__}")
    if isinstance(given, str) and FACTORY.fullmatch(given) and not os.path.lexists(given):
        return call_factory(given, {}, "decoder")
    return fetch(given, None, options.progress).path


def _open_loras(family: str, options: Options) -> tuple[Lora, ...]:
    """Read the LoRA files. Raises InvalidArgumentError if a scale is not a number or the family takes none."""
    for given in options.lora:
        parse_lora(given)  # report mistakes in all of them before the first is read
    if options.lora and not FAMILIES[family].takes_lora:
        able = ", ".join(name for name, other in FAMILIES.items() if other.takes_lora)
        raise InvalidArgumentError(f"lora was given, but the family {family} takes none, only {able}. Leave it out, or merge it before the export.")
    return tuple(open_lora(given, options.progress) for given in options.lora)


def _lora_notes(loras: tuple[Lora, ...]) -> Iterator[str]:
    """Notes about what was not merged. Raises CheckpointError if nothing of a file was."""
    for lora in loras:
        yield from lora.notes
        for component, layers in lora.layers.items():
            if component not in lora.merged:
                part, count = component.replace("_", " "), f"{len(layers)} layer{'s' * (len(layers) != 1)}"
                if not lora.merged:
                    raise CheckpointError(f"{lora.describe()} only has layers for the {part}, which this bundle does not have. Leave it out.")
                yield f"{lora.describe()} also has {count} for the {part}, which this bundle does not have: they are left out"


def _check_output(destination: Path, options: Options) -> None:
    check_destination(destination, force=options.force)
    if options.report is not None:
        check_report_path(Path(options.report), destination)


def _check_options_apply(model: Model, options: Options) -> None:
    """Raise InvalidArgumentError for options that have no effect on this model."""
    own_pixels = isinstance(model.decoder, ImageDecoder)
    unused = {
        "decoder": options.decoder is not None and own_pixels,
        "latents": options.latents and not isinstance(model.decoder, Latents),
        "with_encoder": options.with_encoder and model.encoder is None,
        "preview_decoder": options.preview_decoder is not None and model.preview is None,
        "guide": options.guide is not None and model.family != "edm2",
        "text_dtype": options.text_dtype is not None and model.text is None,
        "scheduler": options.scheduler is not None and model.family != SD_DISTILLED,
        "prediction_type": options.prediction_type is not None and model.family != SD_DISTILLED,
        "guidance": options.guidance and model.family != SD_DISTILLED,
    }
    if names := [name for name, is_unused in unused.items() if is_unused]:
        why = f"the family {model.family} has no use for it"
        if names[0] == "text_dtype":
            why = "the checkpoint has no text encoder"
        elif own_pixels and names[0] in OF_LATENTS:
            why = "the samples of this model are pixels, not latents"
        raise InvalidArgumentError(f"{names[0]} was given, but {why}. Leave it out.")
    shape = model.output.shape
    if options.size is not None and model.output.kind == "image" and shape[:2] != options.size:
        raise InvalidArgumentError(f"size must be this model's own, {shape[0]}x{shape[1]}, got {options.size[0]}x{options.size[1]}")


def composed_steps(model: Model, options: Options) -> list[int]:
    """Step counts to compose whole samplers for; raises InvalidArgumentError for a count that the model has no times for."""
    default = [count for count in model.times if count <= MAX_COMPOSED_STEPS] or [count for count in [min(model.times)] if count <= LARGEST_SAMPLER]
    steps = sorted(set(default if options.steps is None else options.steps))
    if unknown := sorted(set(steps) - set(model.times)):
        raise InvalidArgumentError(f"steps must be among {sorted(model.times)}, the counts this checkpoint has times for; got {unknown}")
    if steps and steps[-1] > LARGEST_SAMPLER:
        raise InvalidArgumentError(f"steps must be at most {LARGEST_SAMPLER}, since a composed sampler has a copy of the network for each; got {steps[-1]}")
    return steps


def graph_opset(options: Options) -> int:
    """ONNX operator set of the graphs."""
    return options.opset or DEFAULT_OPSET[options.dtype or "fp32"]
