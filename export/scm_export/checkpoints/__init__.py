"""Readers: one a file format, each from a file to tensors and metadata, none of which runs code from the file unless it is trusted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
from torch import nn

from scm_export.checkpoints.archive import archive_kind
from scm_export.checkpoints.diffusers_folder import DiffusersFolder, is_diffusers_folder
from scm_export.checkpoints.edm2_pickles import is_plain_pickle, load_edm2_pickle, read_edm2_pickle
from scm_export.checkpoints.exported import read_exported
from scm_export.checkpoints.header import DOCUMENT, ConditioningSpec, Header, SamplerSpec, example_config, read_header
from scm_export.checkpoints.native import (
    FORMAT,
    Checkpoint,
    checkpoint_from,
    is_safetensors,
    load_checkpoint,
    read_safetensors,
    read_start,
    save_checkpoint,
)
from scm_export.checkpoints.program import Program, make_network
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
    "Opened",
    "Program",
    "SamplerSpec",
    "load",
    "load_checkpoint",
    "load_edm2_pickle",
    "open_checkpoint",
    "save_checkpoint",
]

Loaded = Checkpoint | DiffusersFolder | Program
"""What a reader returns; each has ``describe()``, a few words for messages."""


class Opened(NamedTuple):
    """A checkpoint that has been read, and the key of the set of weights that was taken, where it lay under one."""

    checkpoint: Loaded
    weights: str | None = None


def load(
    path: str | os.PathLike[str],
    *,
    trust: bool = False,
    config: str | os.PathLike[str] | None = None,
    factory: str | None = None,
    weights: str | None = None,
    parametrisation: ParametrisationName | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Loaded:
    """Read a checkpoint of any format. Without ``trust``, no code from it is run.

    Args:
        path: a file or folder; its format is found from its contents.
        trust: open what can only be opened by running code from it: TorchScript, pickled modules, any ``.pt2``.
        config: a TOML or JSON file that says what a file of bare tensors, or a program, is (docs/checkpoint-format.md).
        factory: ``package.module:function``, which returns the network that the tensors are for. The function is run.
        weights: dotted key of one of several sets of weights in a training checkpoint, such as ``"ema"``, or name of a network in an EDM2 pickle.
            None: the only one, or of several the only moving average.
        parametrisation: in place of the one that the checkpoint or the config names.
        progress: told which tensors are taken where a file holds them among other things.

    Raises:
        CheckpointNotFoundError: nothing there.
        CheckpointError: it cannot be read, or only with ``trust``; or config or factory do not fit it; or it holds several sets of weights.
        InvalidArgumentError: config, factory, weights or parametrisation given for a checkpoint that has its own, or not to be found.
    """
    return open_checkpoint(path, trust=trust, config=config, factory=factory, weights=weights, parametrisation=parametrisation, progress=progress).checkpoint


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    trust: bool = False,
    config: str | os.PathLike[str] | None = None,
    factory: str | None = None,
    weights: str | None = None,
    parametrisation: ParametrisationName | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Opened:
    """:func:`load`, and which set of weights was taken."""
    source, header = Path(path), None if config is None else read_header(Path(config))
    if parametrisation is not None and parametrisation not in PARAMETRISATION_NAMES:
        raise InvalidArgumentError(f"parametrisation must be one of {', '.join(PARAMETRISATION_NAMES)}, got {parametrisation!r}")
    if is_diffusers_folder(source):
        given = {"config": config, "factory": factory, "weights": weights, "parametrisation": parametrisation}
        if names := ", ".join(name for name, value in given.items() if value is not None):
            raise InvalidArgumentError(f"'{source}' is a diffusers folder, which says itself what it is: leave out {names}")
        return Opened(DiffusersFolder(source))
    opened = _open_file(source, header, factory, weights, trust, progress)
    if parametrisation is not None:
        _sample_as(opened.checkpoint, parametrisation)
    return opened


def _open_file(source: Path, header: Header | None, factory: str | None, weights: str | None, trust: bool, progress: Callable[[str], None]) -> Opened:
    start = read_start(source)
    kind = archive_kind(source) if is_zip(source) else None
    if kind in ("torch.export", "TorchScript"):
        if factory is not None:
            raise InvalidArgumentError(f"'{source}' is a program and holds its network: leave out the factory")
        _check_no_choice(weights, source, "is a program and holds its own weights")
        program, original = (read_exported(source, trust=trust), None) if kind == "torch.export" else read_torchscript(source, trust=trust)
        inputs = tuple(program.inputs)
        return Opened(Program(_needed(header, source, inputs[2:]), program, f"the {kind} program '{source}'", inputs=inputs, original=original))
    if is_plain_pickle(start):
        if header is not None or factory is not None:
            raise InvalidArgumentError(f"'{source}' is a pickle, read as EDM2's, which say themselves what they are: leave out config and factory")
        return Opened(*read_edm2_pickle(source, weights))
    raw: object
    if is_safetensors(source, start):
        raw = read_safetensors(source)
        _check_no_choice(weights, source, "is one set of weights")
        if raw.get("format") != FORMAT:
            raw = raw["weights"]
    else:
        raw = read_torch_file(source, trust=trust)
    if isinstance(raw, nn.Module):
        _check_no_choice(weights, source, "is a network with its own weights")
        return Opened(Program(_needed(header, source), raw, f"the pickled {type(raw).__name__} in '{source}'"))
    checkpoint, key = _checkpoint(raw, source, header, factory, weights, progress)
    if factory is None:
        return Opened(checkpoint, key)
    header = Header(**{name: getattr(checkpoint, name) for name in Header.__struct_fields__})
    if header.family != "module":
        raise InvalidArgumentError(f"a factory is for networks of your own, of the family 'module'; '{source}' is of the family {header.family!r}")
    arguments = header.config.get("arguments", {})
    network = make_network(factory, arguments if isinstance(arguments, dict) else {})
    return Opened(Program(header, network, f"'{source}' with the factory {factory}", weights=checkpoint.weights), key)


def _checkpoint(
    raw: object, source: Path, header: Header | None, factory: str | None, weights: str | None, progress: Callable[[str], None]
) -> tuple[Checkpoint, str | None]:
    """Tensors and what they are, from one file or two, and the key that the tensors lay under."""
    if isinstance(raw, dict) and raw.get("format") == FORMAT:
        if header is not None:
            raise InvalidArgumentError(f"'{source}' is a scm-checkpoint and says itself what it is: leave out the config")
        _check_no_choice(weights, source, "is a scm-checkpoint and holds one set of weights")
        return checkpoint_from(raw, source), None
    chosen = choose_weights(raw, source, weights, progress)
    if header is None:
        network = " and not the network that they are for" if factory is None else ""
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
            f"'{source}' holds a network, but not how it is sampled: give --config FILE.toml, which says it ({DOCUMENT}). "
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
