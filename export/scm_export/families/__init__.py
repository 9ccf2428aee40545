"""Families: one file each, from a checkpoint's metadata and tensors to a :class:`~scm_export.model.Model`."""

from collections.abc import Callable

from scm_export.checkpoints import Checkpoint
from scm_export.families.edm2 import build_edm2
from scm_export.model import Model
from scm_runtime.errors import CheckpointError

FAMILIES: dict[str, Callable[[Checkpoint], Model]] = {
    "edm2": build_edm2,
}


def build_model(checkpoint: Checkpoint) -> Model:
    """Make the model of a checkpoint; raises CheckpointError for an unknown family or contents that do not fit it."""
    if checkpoint.family not in FAMILIES:
        raise CheckpointError(f"family must be one of {', '.join(sorted(FAMILIES))}, got {checkpoint.family!r}")
    return FAMILIES[checkpoint.family](checkpoint)
