"""Readers: one a file format, each from a file to tensors and metadata, none of which runs code from the file."""

from __future__ import annotations

import os
from pathlib import Path

from scm_export.checkpoints.diffusers_folder import DiffusersFolder, is_diffusers_folder
from scm_export.checkpoints.native import Checkpoint, SamplerSpec, load_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "DiffusersFolder", "Loaded", "SamplerSpec", "load", "load_checkpoint", "save_checkpoint"]

Loaded = Checkpoint | DiffusersFolder
"""What a reader returns; each has ``describe()``, a few words for messages."""


def load(path: str | os.PathLike[str]) -> Loaded:
    """Read a checkpoint of any format. No code from it is run.

    Raises:
        CheckpointNotFoundError: nothing there.
        CheckpointError: it cannot be read, or only by running code from it.
    """
    source = Path(path)
    if is_diffusers_folder(source):
        return DiffusersFolder(source)
    return load_checkpoint(source)
