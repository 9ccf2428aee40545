"""Checks of a file's tensors: a dict of tensors by name, and values that are finite."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from scm_export.errors import CheckpointError
from scm_runtime.common.message_text import printable


def check_tensor_dict(raw: object, file: Path, remedy: str) -> dict[str, Tensor]:
    """Return what a file holds as a dict of tensors by name.

    Raises:
        CheckpointError: it is something else; the message ends with ``remedy``.
    """
    if not isinstance(raw, dict):
        raise CheckpointError(f"'{file}' must hold a dict of tensors by name, got a {type(raw).__name__}. {remedy}")
    for name, tensor in raw.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"'{file}' must hold tensors by name, got a {type(tensor).__name__} for '{printable(name)}'. {remedy}")
    return raw


def is_finite(tensor: Tensor) -> bool:
    """Return True if all elements are finite. The extremes are NaN if any element is, and unlike torch.isfinite they take no memory."""
    return not tensor.numel() or not tensor.is_floating_point() or all(math.isfinite(extreme) for extreme in tensor.aminmax())
