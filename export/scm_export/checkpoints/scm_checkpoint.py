"""The scm-checkpoint format: one file with everything a sampler needs. Documented in docs/checkpoint-format.md.

A ``.pt`` file is a ``torch.save`` of plain containers and tensors, read with ``weights_only``. A ``.safetensors`` file has the same contents,
with the header as JSON in the metadata under the key "scm".
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from scm_export.checkpoints.header import ConditioningSpec, SamplerSpec, convert, validate
from scm_export.checkpoints.reading import reading
from scm_export.checkpoints.safetensors_file import open_safetensors
from scm_export.checkpoints.torch_file import read_torch_file
from scm_export.errors import CheckpointError, CheckpointNotFoundError
from scm_runtime.bundle import hub
from scm_runtime.common.documents import check_depth, decode_json
from scm_runtime.common.files import open_regular, output_file
from scm_runtime.common.message_text import first_line, printable
from scm_runtime.errors import OutputError

FORMAT, VERSION = "scm-checkpoint", 1


class Checkpoint(Struct, kw_only=True, forbid_unknown_fields=True):
    """Contents of a scm-checkpoint. ``weights`` are the ones to sample with: the moving average if training kept one."""

    format: str = FORMAT
    version: int = VERSION
    family: str
    config: dict[str, Any]
    sampler: SamplerSpec
    label_names: tuple[str, ...] | None = None
    licence: str | None = None
    conditioning: tuple[ConditioningSpec, ...] = ()
    """Inputs of a user-defined network (family "module"); the other families define theirs."""
    weights: dict[str, Any]

    def describe(self) -> str:
        """Short description for error messages."""
        return f"the checkpoint of the family {self.family!r}"


def save_checkpoint(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint atomically. The file extension, ``.pt`` or ``.safetensors``, selects the format.

    Raises:
        CheckpointError: the path has another extension.
        OutputError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix not in (".pt", ".safetensors"):
        raise CheckpointError(f"'{target}' must end in .pt or .safetensors")
    left_out = ("weights",) if checkpoint.conditioning else ("weights", "conditioning")  # early readers of version 1 do not know "conditioning"
    header = {name: msgspec.to_builtins(getattr(checkpoint, name)) for name in checkpoint.__struct_fields__ if name not in left_out}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.weights.items()}
    try:
        with output_file(target) as part:
            if target.suffix == ".pt":
                torch.save({**header, "weights": weights}, part)
            else:
                save_file(weights, part, {"scm": msgspec.json.encode(header).decode()})
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OutputError(f"cannot write '{target}': {error}. Choose a folder that you may write to, on a disk with room.") from error


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a scm-checkpoint. No code from the file is run.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointError: the file has another format, is damaged, or holds more than tensors and plain values.
    """
    source = Path(path)
    with reading(source):
        return checkpoint_from(read_safetensors(source) if is_safetensors(source, read_start(source)) else read_torch_file(source), source)


def read_start(source: Path) -> bytes:
    """Read the first 16 bytes of a checkpoint file, which identify its format.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointError: the file cannot be read, or is empty.
    """
    try:
        with open_regular(source) as file:
            start = file.read(16)
    except OSError as error:
        wrong = {FileNotFoundError: "the file does not exist", IsADirectoryError: "it is a folder"}.get(type(error), error.strerror or str(error))
        missing = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
        raise (CheckpointNotFoundError if missing else CheckpointError)(
            f"no checkpoint at '{source}': {wrong}. Expected a checkpoint's file, a diffusers folder, "
            f"or a repository of the Hugging Face hub ('org/name').{hub.local_path_hint(str(source))}"
        ) from error
    if not start:
        raise CheckpointError(f"'{source}' is empty. Copy or save the checkpoint again.")
    return start


def is_safetensors(source: Path, start: bytes) -> bool:
    """Return True if a file is in the safetensors format, by its extension or its first bytes."""
    return source.suffix == ".safetensors" or start[8:9] == b"{"


def checkpoint_from(raw: object, source: Path) -> Checkpoint:
    """Validate the contents of a file as a scm-checkpoint.

    Raises:
        CheckpointError: it is not a scm-checkpoint, or its contents are inconsistent.
    """
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise CheckpointError(
            f"'{source}' is not a scm-checkpoint: it must hold a dict with format = {FORMAT!r}, family, config, sampler and weights. "
            "Write one with scm_export.checkpoints.save_checkpoint (docs/checkpoint-format.md)."
        )
    if raw.get("version") != VERSION:
        raise CheckpointError(
            f"'{source}' has checkpoint version {printable(raw.get('version'))}, this scm-export reads version {VERSION}. "
            "Upgrade: pip install -U . in an updated clone"
        )
    try:
        check_depth({name: value for name, value in raw.items() if name != "weights"})
        checkpoint = convert(raw, Checkpoint)
        validate(checkpoint.family, checkpoint.sampler, checkpoint.conditioning, checkpoint.label_names, checkpoint.licence)
    except ValueError as error:
        raise CheckpointError(f"'{source}' does not hold what a scm-checkpoint must: {first_line(error)} (docs/checkpoint-format.md)") from error
    strange = [name for name, tensor in checkpoint.weights.items() if not isinstance(tensor, Tensor)]
    if strange:
        raise CheckpointError(f"'{source}': weights must be tensors, got {type(checkpoint.weights[strange[0]]).__name__} for '{printable(strange[0])}'")
    return checkpoint


def read_safetensors(source: Path) -> Mapping[str, object]:
    """Read a .safetensors file: its tensors under the key "weights" and, if it is a scm-checkpoint, the fields of its header.

    Raises:
        CheckpointError: the file is damaged.
    """
    with reading(source), open_safetensors(source) as file:
        metadata = file.metadata()
        header = decode_json(metadata["scm"]) if "scm" in metadata else {}
        if not isinstance(header, dict):
            raise CheckpointError(f"'{source}' is not a readable .safetensors file: its metadata 'scm' must be a JSON object. Save it again.")
        return {**header, "weights": dict(file.tensors())}
