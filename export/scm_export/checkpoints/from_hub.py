"""Resolves a checkpoint to a local path. From a repository of the Hugging Face hub, only the files that a reader needs are downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from scm_export.checkpoints.diffusers_folder import CARD, MODEL, PIPELINE
from scm_export.errors import CheckpointError
from scm_runtime.bundle import hub
from scm_runtime.common.documents import read_json

NETWORKS = ("unet", "transformer", "vae")  # components of a pipeline
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")  # they may be larger than all others
TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection", "Gemma2Model")  # those that a family exports
TOKENIZERS = ("tokenizer*/merges.txt", "tokenizer*/*.model")  # besides JSON
WEIGHT_PATTERNS = {
    name: (
        (f"{name}.safetensors", f"{name}-*.safetensors"),
        (f"{name}.fp16.safetensors", f"{name}.fp16-*.safetensors"),
        (f"{binary}.bin", f"{binary}-*.bin"),
    )
    for name, binary in (("diffusion_pytorch_model", "diffusion_pytorch_model"), ("model", "pytorch_model"))
}  # by the name that diffusers and transformers give the weights; the first that exists is used
SINGLE_FILES = (".pt", ".pth", ".pt2", ".pkl", ".safetensors")


class ResolvedCheckpoint(NamedTuple):
    """A checkpoint on disk."""

    path: Path
    name: str
    """Name for the manifest: that of the file or folder, or ``org/name@commit``."""
    bundle: Path
    """Default path of the exported bundle."""


def fetch(checkpoint: str | os.PathLike[str], revision: str | None, progress: Callable[[str], None], *, text: bool = False) -> ResolvedCheckpoint:
    """Resolve a checkpoint to a local path and download it if it is on the hub; with ``text`` also the text encoders of a pipeline, and its model card.

    An existing path always counts as a path. The readers report a path that does not exist.

    Raises:
        HubError: the hub has no such repository, or cannot be reached.
        CheckpointError: the repository has no checkpoint of a known format.
        InvalidArgumentError: a revision was given for a path.
        MissingDependencyError: the checkpoint is on the hub and huggingface_hub is not installed.
    """
    repository = hub.repository(checkpoint, revision)
    if repository is None:
        path = Path(checkpoint)
        named = path if path.name else path.absolute()  # "." has no name
        return ResolvedCheckpoint(path, named.name, named.with_name(f"{named.name}.scm") if _is_folder(path) else named.with_suffix(".scm"))
    progress(f"fetching {repository}")
    folder = hub.snapshot(repository, revision, ["*.json"])
    path = _diffusers(repository, folder, text=text) if any((folder / name).is_file() for name in (PIPELINE, MODEL)) else _single_file(repository, folder)
    return ResolvedCheckpoint(path, f"{repository}@{folder.name}", Path(f"{repository.rpartition('/')[2]}.scm"))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # the name is too long: the reader reports it
        return False


def _diffusers(repository: str, folder: Path, *, text: bool) -> Path:
    index = _index(folder)
    for part in [name for name in NETWORKS if name in index] or [""]:
        _weights(repository, folder, part, "diffusion_pytorch_model")
    encoders = [name for name in TEXT_ENCODERS if text and _class(index.get(name)) in TEXT_CLASSES]
    for part in encoders:
        _weights(repository, folder, part, "model")
    hub.snapshot(repository, folder.name, [*(TOKENIZERS if encoders else ()), CARD])
    return folder


def _weights(repository: str, folder: Path, part: str, stem: str) -> None:
    for kind in WEIGHT_PATTERNS[stem]:
        hub.snapshot(repository, folder.name, [f"{part}/{name}" if part else name for name in kind])
        if any(next((folder / part).glob(name), None) for name in kind):
            break


def _class(entry: object) -> object:
    """Class name of a component's entry in ``model_index.json``."""
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _index(folder: Path) -> dict[str, object]:
    """Read ``model_index.json``; empty if it is invalid, which the reader reports."""
    try:
        index = read_json(folder / PIPELINE)
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _single_file(repository: str, folder: Path) -> Path:
    hub.snapshot(repository, folder.name, [f"*{ending}" for ending in SINGLE_FILES])
    files = sorted(_files(folder))
    if len(files) == 1:
        return files[0]
    what = f"{len(files)} files of weights: {', '.join(str(file.relative_to(folder)) for file in files[:6])}" if files else "none"
    raise CheckpointError(
        f"the repository '{repository}' must hold a diffusers folder ({PIPELINE} or {MODEL}) or one file ({', '.join(SINGLE_FILES)}), got {what}. "
        "Download the file that you want to export and give its path."
    )


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix in SINGLE_FILES and path.is_file())
