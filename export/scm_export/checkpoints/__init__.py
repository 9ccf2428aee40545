"""Checkpoint readers, one per file format. Each turns a file into tensors and metadata; none runs code from the file unless the caller trusts it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import msgspec
from torch import nn

from scm_export.checkpoints.archive import archive_kind
from scm_export.checkpoints.diffusers_folder import DiffusersFolder, is_diffusers_folder
from scm_export.checkpoints.edm2_pickles import is_plain_pickle, load_edm2_pickle, read_edm2_pickle
from scm_export.checkpoints.header import DOCUMENT, ConditioningSpec, Header, SamplerSpec, example_config, read_header
from scm_export.checkpoints.program import Program, call_factory, copy_network
from scm_export.checkpoints.reading import reading
from scm_export.checkpoints.scm_checkpoint import (
    FORMAT,
    Checkpoint,
    checkpoint_from,
    is_safetensors,
    load_checkpoint,
    read_safetensors,
    read_start,
    save_checkpoint,
)
from scm_export.checkpoints.single_file import SingleFile, is_original_layout
from scm_export.checkpoints.torch_export import read_torch_export
from scm_export.checkpoints.torch_file import is_zip, read_torch_file
from scm_export.checkpoints.torchscript import read_torchscript
from scm_export.checkpoints.weight_sets import choose_weights
from scm_export.choices import PARAMETRISATION_NAMES, ParametrisationName
from scm_export.errors import CheckpointError
from scm_runtime.errors import InvalidArgumentError

__all__ = [
    "Checkpoint",
    "ConditioningSpec",
    "DiffusersFolder",
    "Header",
    "Loaded",
    "OpenedCheckpoint",
    "Program",
    "SamplerSpec",
    "load",
    "load_checkpoint",
    "load_edm2_pickle",
    "open_checkpoint",
    "open_network",
    "save_checkpoint",
]

Loaded = Checkpoint | DiffusersFolder | Program
"""What a reader returns. Each type has ``describe()``, a short description for error messages."""


class OpenedCheckpoint(NamedTuple):
    """A checkpoint, and which of the file's sets of weights it holds."""

    checkpoint: Loaded
    weights: str | None = None
    """Dotted key of the set of weights in the file; None if the file has only one and no key for it."""


class ReadOptions(TypedDict, total=False):
    """The options of :func:`open_checkpoint`, which describes them."""

    trust: bool
    config: str | os.PathLike[str] | Mapping[str, Any] | None
    factory: str | None
    weights: str | None
    parametrisation: ParametrisationName | None
    progress: Callable[[str], None]


def load(path: str | os.PathLike[str], **options: Unpack[ReadOptions]) -> Loaded:
    """Read a checkpoint of any format. The options and errors are those of :func:`open_checkpoint`."""
    return open_checkpoint(path, **options).checkpoint


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    trust: bool = False,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    factory: str | None = None,
    weights: str | None = None,
    parametrisation: ParametrisationName | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> OpenedCheckpoint:
    """Read a checkpoint of any format and report which set of weights was used. Without ``trust``, no code from the file is run.

    Args:
        path: a file or folder; the format is detected from its contents.
        trust: also open formats that can only be read by running code from the file: TorchScript, pickled modules, and any ``.pt2``.
        config: TOML or JSON file, or a dict, that describes bare tensors or a program (docs/checkpoint-format.md).
        factory: ``package.module:function`` that returns the network for the tensors. The function is called.
        weights: dotted key of one of several sets of weights in a training checkpoint, such as ``"ema"``, or the name of a network in an EDM2 pickle.
            None selects the only set, or the only moving average among several.
        parametrisation: overrides the one in the checkpoint or the config.
        progress: called with a message that names the selected tensors if the file holds other things as well.

    Raises:
        CheckpointNotFoundError: there is no file or folder at the path.
        CheckpointError: the file cannot be read, or only with ``trust``; config or factory do not fit it; or it holds several sets of weights.
        InvalidArgumentError: config, factory, weights or parametrisation was given for a checkpoint that defines it, or was not found.
    """
    source, header = Path(path), None if config is None else read_header(config)
    _check_parametrisation(parametrisation)
    if is_diffusers_folder(source):
        given = {"config": config, "factory": factory, "weights": weights, "parametrisation": parametrisation}
        if names := ", ".join(name for name, value in given.items() if value is not None):
            raise InvalidArgumentError(f"'{source}' is a diffusers folder, which describes itself: leave out {names}")
        return OpenedCheckpoint(DiffusersFolder(source))
    notes: list[str] = []
    with reading(source):
        opened = _open_file(source, header, factory, weights, trust, notes.append)
    for note in notes:
        progress(note)
    if parametrisation is not None:
        if isinstance(opened.checkpoint, DiffusersFolder):
            raise InvalidArgumentError(f"parametrisation was given for {opened.checkpoint.describe()}: leave it out. --prediction-type is its option.")
        _sample_as(opened.checkpoint, parametrisation)
    return opened


def open_network(network: nn.Module, config: str | os.PathLike[str] | Mapping[str, Any] | None, parametrisation: ParametrisationName | None) -> Program:
    """Describe a network in memory. The arguments are those of :func:`open_checkpoint`; the network itself stays as it is.

    Raises:
        CheckpointError: there is no config, it is wrong, or the network cannot be copied.
        InvalidArgumentError: there is no such parametrisation, or it does not fit the config.
    """
    what = f"the network {type(network).__name__}"
    if config is None:
        raise CheckpointError(
            f"{what} does not say how it is sampled: give config, a file or a dict with the same contents ({DOCUMENT}). A file to copy:\n\n{example_config()}"
        )
    _check_parametrisation(parametrisation)
    program = Program(read_header(config), copy_network(network, what), what)
    if parametrisation is not None:
        _sample_as(program, parametrisation)
    return program


def _check_parametrisation(name: str | None) -> None:
    if name is not None and name not in PARAMETRISATION_NAMES:
        raise InvalidArgumentError(f"parametrisation must be one of {', '.join(PARAMETRISATION_NAMES)}, got {name!r}")


def _open_file(source: Path, header: Header | None, factory: str | None, weights: str | None, trust: bool, progress: Callable[[str], None]) -> OpenedCheckpoint:
    start = read_start(source)
    kind = archive_kind(source) if is_zip(source) else None
    if kind in ("torch.export", "TorchScript"):
        if factory is not None:
            raise InvalidArgumentError(f"'{source}' is a program and holds its network: leave out the factory")
        _check_no_choice(weights, source, "is a program and holds its own weights")
        program, original = (read_torch_export(source, trust=trust), None) if kind == "torch.export" else read_torchscript(source, trust=trust)
        inputs = tuple(program.inputs)
        return OpenedCheckpoint(Program(_needed(header, source, inputs[2:]), program, f"the {kind} program '{source}'", inputs=inputs, original=original))
    if is_plain_pickle(start):
        if header is not None or factory is not None:
            raise InvalidArgumentError(f"'{source}' is a pickle, read as an EDM2 pickle, which describes itself: leave out config and factory")
        return OpenedCheckpoint(*read_edm2_pickle(source, weights))
    raw: object
    if is_safetensors(source, start):
        raw = read_safetensors(source)
        _check_no_choice(weights, source, "is one set of weights")
        if raw.get("format") != FORMAT:
            raw = raw["weights"]
            if isinstance(raw, dict) and header is None and factory is None and is_original_layout(raw):
                return OpenedCheckpoint(SingleFile(source, raw))
    else:
        raw = read_torch_file(source, trust=trust)
    if isinstance(raw, nn.Module):
        _check_no_choice(weights, source, "is a network with its own weights")
        return OpenedCheckpoint(Program(_needed(header, source), raw, f"the pickled {type(raw).__name__} in '{source}'"))
    checkpoint, key = _checkpoint(raw, source, header, factory, weights, progress)
    if factory is None:
        return OpenedCheckpoint(checkpoint, key)
    header = Header(**{name: getattr(checkpoint, name) for name in Header.__struct_fields__})
    if header.family != "module":
        raise InvalidArgumentError(f"a factory is for user-defined networks, of the family 'module'; '{source}' is of the family {header.family!r}")
    arguments = header.config.get("arguments", {})
    network = call_factory(factory, arguments if isinstance(arguments, dict) else {})
    return OpenedCheckpoint(Program(header, network, f"'{source}' with the factory {factory}", weights=checkpoint.weights), key)


def _checkpoint(
    raw: object, source: Path, header: Header | None, factory: str | None, weights: str | None, progress: Callable[[str], None]
) -> tuple[Checkpoint, str | None]:
    """Combine tensors with their description, from the same file or from a config; also return the key of the tensors in the file."""
    if isinstance(raw, dict) and raw.get("format") == FORMAT:
        if header is not None:
            raise InvalidArgumentError(f"'{source}' is a scm-checkpoint, which describes itself: leave out the config")
        _check_no_choice(weights, source, "is a scm-checkpoint and holds one set of weights")
        return checkpoint_from(raw, source), None
    chosen = choose_weights(raw, source, weights, progress)
    if header is None:
        network = " and not the network itself" if factory is None else ""
        given = "--factory package.module:function, which returns the network, and " if factory is None else ""
        raise CheckpointError(
            f"'{source}' holds weights, but not how it is sampled{network}: give {given}--config FILE.toml, which describes it ({DOCUMENT}). "
            f"A config to copy:\n\n{example_config()}"
        )
    return Checkpoint(**{name: getattr(header, name) for name in Header.__struct_fields__}, weights=chosen.tensors), chosen.key or None


def _check_no_choice(weights: str | None, source: Path, what: str) -> None:
    if weights is not None:
        raise InvalidArgumentError(f"'{source}' {what}: leave out weights, got {weights!r}")


def _needed(header: Header | None, source: Path, inputs: tuple[str, ...] = ()) -> Header:
    if header is None:
        raise CheckpointError(
            f"'{source}' holds a network, but not how it is sampled: give --config FILE.toml, which describes it ({DOCUMENT}). "
            f"A config to copy:\n\n{example_config(inputs)}"
        )
    return header


def _sample_as(loaded: Loaded, parametrisation: ParametrisationName) -> None:
    assert not isinstance(loaded, DiffusersFolder)
    holder = loaded.header if isinstance(loaded, Program) else loaded
    holder.sampler = msgspec.structs.replace(holder.sampler, parametrisation=parametrisation)
    try:
        holder.sampler.validate()
    except ValueError as error:
        raise InvalidArgumentError(f"parametrisation {parametrisation}: {error}") from error
