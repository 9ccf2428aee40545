"""Where a checkpoint is: a path, or a repository of the Hugging Face hub, of which the files that a reader needs are fetched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from scm_export.checkpoints.diffusers_folder import MODEL, PIPELINE
from scm_export.errors import CheckpointError
from scm_runtime.bundle import hub

NETWORKS = ("unet", "transformer", "vae")  # of a pipeline; its text encoder, which is larger than all of them, is not read
WEIGHTS = "diffusion_pytorch_model"
KINDS = (("{}.safetensors", "{}-*.safetensors"), ("{}.fp16.safetensors", "{}.fp16-*.safetensors"), ("{}.bin", "{}-*.bin"))  # the first that there is
SINGLE_FILES = (".pt", ".pth", ".pt2", ".pkl", ".safetensors")


class Found(NamedTuple):
    """A checkpoint on disk."""

    path: Path
    name: str
    """For the manifest: the file's or folder's, or ``org/name@commit``."""
    bundle: Path
    """Where its bundle goes unless the user says otherwise."""


def fetch(checkpoint: str | os.PathLike[str], revision: str | None, progress: Callable[[str], None]) -> Found:
    """Find a checkpoint; what exists as a path is a path, whether there is anything at a path is the reader's to say.

    Raises:
        HubError: the hub has no such repository, or cannot be asked.
        CheckpointError: the repository holds nothing that a reader knows.
        InvalidArgumentError: a revision is given for a path.
        MissingDependencyError: it is a repository, and huggingface_hub is not installed.
    """
    repository = hub.repository(checkpoint, revision)
    if repository is None:
        path = Path(checkpoint)
        named = path if path.name else path.absolute()  # "." has no name
        return Found(path, named.name, named.with_name(f"{named.name}.scm") if _is_folder(path) else named.with_suffix(".scm"))
    progress(f"fetching {repository}")
    folder = hub.snapshot(repository, revision, ["*.json"])
    path = _diffusers(repository, folder) if any((folder / name).is_file() for name in (PIPELINE, MODEL)) else _single_file(repository, folder)
    return Found(path, f"{repository}@{folder.name}", Path(f"{repository.rpartition('/')[2]}.scm"))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long: the reader says so
        return False


def _diffusers(repository: str, folder: Path) -> Path:
    parts = [name for name in NETWORKS if name in _index(folder)] or [""]
    for part in parts:
        for kind in KINDS:
            patterns = [f"{part}/{name.format(WEIGHTS)}" if part else name.format(WEIGHTS) for name in kind]
            hub.snapshot(repository, folder.name, patterns)
            if any(next((folder / part).glob(name.format(WEIGHTS)), None) for name in kind):
                break
    return folder


def _index(folder: Path) -> dict[str, object]:
    """``model_index.json``; what is wrong with it is the reader's to say."""
    try:
        index = json.loads((folder / PIPELINE).read_bytes())
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
        "Download the file you mean, and give its path."
    )


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix in SINGLE_FILES and path.is_file())
