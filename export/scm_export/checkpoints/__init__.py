"""Readers: one a file format, each from a file to tensors and metadata, none of which runs code from the file unless it is trusted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
from torch import nn

from scm_export.checkpoints.archive import archive_kind
from scm_export.checkpoints.diffusers_folder import DiffusersFolder, is_diffusers_folder
from scm_export.checkpoints.edm2_pickles import is_plain_pickle, load_edm2_pickle
from scm_export.checkpoints.exported import read_exported
from scm_export.checkpoints.header import ConditioningSpec, Header, SamplerSpec, read_header
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
from scm_export.checkpoints.state_dict import select_tensors
from scm_export.checkpoints.torch_file import is_zip, read_torch_file
from scm_export.checkpoints.torchscript import read_torchscript
from scm_export.choices import PARAMETRISATION_NAMES, ParametrisationName
from scm_runtime.errors import CheckpointError, InvalidArgumentError

__all__ = [
    "Checkpoint",
    "ConditioningSpec",
    "DiffusersFolder",
    "Header",
    "Loaded",
    "Program",
    "SamplerSpec",
    "load",
    "load_checkpoint",
    "load_edm2_pickle",
    "save_checkpoint",
]

Loaded = Checkpoint | DiffusersFolder | Program
"""What a reader returns; each has ``describe()``, a few words for messages."""


def load(
    path: str | os.PathLike[str],
    *,
    trust: bool = False,
    config: str | os.PathLike[str] | None = None,
    factory: str | None = None,
    parametrisation: ParametrisationName | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Loaded:
    """Read a checkpoint of any format. Without ``trust``, no code from it is run.

    Args:
        path: a file or folder; its format is found from its contents.
        trust: open what can only be opened by running code from it: TorchScript, pickled modules, any ``.pt2``.
        config: a TOML or JSON file that says what a file of bare tensors, or a program, is (docs/checkpoint-format.md).
        factory: ``package.module:function``, which returns the network that the tensors are for. The function is run.
        parametrisation: in place of the one that the checkpoint or the config names.
        progress: told which tensors are taken where a file holds them among other things.

    Raises:
        CheckpointNotFoundError: nothing there.
        CheckpointError: it cannot be read, or only with ``trust``; or config or factory do not fit it.
        InvalidArgumentError: config, factory or parametrisation given for a checkpoint that has its own, or not to be found.
    """
    source, header = Path(path), None if config is None else read_header(Path(config))
    if parametrisation is not None and parametrisation not in PARAMETRISATION_NAMES:
        raise InvalidArgumentError(f"parametrisation must be one of {', '.join(PARAMETRISATION_NAMES)}, got {parametrisation!r}")
    if is_diffusers_folder(source):
        given = {"config": config, "factory": factory, "parametrisation": parametrisation}
        if names := ", ".join(name for name, value in given.items() if value is not None):
            raise InvalidArgumentError(f"'{source}' is a diffusers folder, which says itself what it is: leave out {names}")
        return DiffusersFolder(source)
    loaded = _load_file(source, header, factory, trust, progress)
    return loaded if parametrisation is None else _sampled_as(loaded, parametrisation)


def _load_file(source: Path, header: Header | None, factory: str | None, trust: bool, progress: Callable[[str], None]) -> Checkpoint | Program:
    start = read_start(source)
    kind = archive_kind(source) if is_zip(source) else None
    if kind in ("torch.export", "TorchScript"):
        if factory is not None:
            raise InvalidArgumentError(f"'{source}' is a program and holds its network: leave out the factory")
        program, original = (read_exported(source, trust=trust), None) if kind == "torch.export" else read_torchscript(source, trust=trust)
        return Program(_needed(header, source), program, f"the {kind} program '{source}'", inputs=tuple(program.inputs), original=original)
    if is_plain_pickle(start):
        if header is not None or factory is not None:
            raise InvalidArgumentError(f"'{source}' is a pickle, read as EDM2's, which say themselves what they are: leave out config and factory")
        return load_edm2_pickle(source)
    raw: object = read_safetensors(source) if is_safetensors(source, start) else read_torch_file(source, trust=trust)
    if isinstance(raw, nn.Module):
        return Program(_needed(header, source), raw, f"the pickled {type(raw).__name__} in '{source}'")
    checkpoint = _checkpoint(raw, source, header, factory, progress)
    if factory is None:
        return checkpoint
    header = Header(**{name: getattr(checkpoint, name) for name in Header.__struct_fields__})
    if header.family != "module":
        raise InvalidArgumentError(f"a factory is for networks of your own, of the family 'module'; '{source}' is of the family {header.family!r}")
    arguments = header.config.get("arguments", {})
    network = make_network(factory, arguments if isinstance(arguments, dict) else {})
    return Program(header, network, f"'{source}' with the factory {factory}", weights=checkpoint.weights)


def _checkpoint(raw: object, source: Path, header: Header | None, factory: str | None, progress: Callable[[str], None]) -> Checkpoint:
    """Tensors and what they are, from one file or two."""
    native = isinstance(raw, dict) and raw.get("format") == FORMAT
    if native and header is not None:
        raise InvalidArgumentError(f"'{source}' is a scm-checkpoint and says itself what it is: leave out the config")
    if native or (header is None and factory is None):
        return checkpoint_from(raw, source)
    header = _needed(header, source)
    bare = raw["weights"] if isinstance(raw, dict) and raw.keys() == {"weights"} else raw
    weights, key = select_tensors(bare, source)
    if key:
        progress(f"taking the tensors under {key!r}")
    return Checkpoint(**{name: getattr(header, name) for name in Header.__struct_fields__}, weights=weights)


def _needed(header: Header | None, source: Path) -> Header:
    if header is None:
        raise CheckpointError(
            f"'{source}' holds a network but not how it is sampled: say it with --config FILE.toml "
            "(sample_shape, parametrisation, times, conditioning: docs/checkpoint-format.md)"
        )
    return header


def _sampled_as(loaded: Checkpoint | Program, parametrisation: ParametrisationName) -> Checkpoint | Program:
    holder = loaded.header if isinstance(loaded, Program) else loaded
    holder.sampler = msgspec.structs.replace(holder.sampler, parametrisation=parametrisation)
    try:
        holder.sampler.validate()
    except ValueError as error:
        raise InvalidArgumentError(f"parametrisation {parametrisation}: {error}") from error
    return loaded
