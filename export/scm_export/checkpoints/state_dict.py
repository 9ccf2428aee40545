"""Names of the tensors in a ``state_dict``."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

logger = logging.getLogger("scm_export")

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "unet.")  # DistributedDataParallel, torch.compile, and wrappers by custom


def strip_prefixes(weights: dict[str, Any], expected: Collection[str]) -> str:
    """Rename tensors in place to a network's names, where a wrapper put its own before them all; returns what was taken off, "" where nothing fits."""
    names, taken = list(weights), ""
    while names and not set(names) <= set(expected):
        prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in names)), None)
        if prefix is None:
            return ""
        names, taken = [name.removeprefix(prefix) for name in names], taken + prefix
    if taken:
        for name in list(weights):
            weights[name.removeprefix(taken)] = weights.pop(name)
        logger.info("took %r off the names of all tensors", taken)
    return taken
