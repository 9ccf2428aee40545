"""Names of the tensors in a ``state_dict``."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

logger = logging.getLogger("scm_export")

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "unet.", "ema_model.")  # DistributedDataParallel, torch.compile, and wrappers by custom
COMPILED = "_orig_mod"  # the name of the module inside a compiled one


# What classes of moving averages keep beside the weights: torch's AveragedModel, LDM's LitEma, ema-pytorch.
COUNTERS = ("n_averaged", "decay", "num_updates", "initted", "step")
OTHER_MODEL = "online_model."  # of ema-pytorch, beside "ema_model."


def drop_bookkeeping(weights: dict[str, Any], expected: Collection[str]) -> None:
    """Leave out, in place, what a moving average's class keeps beside its weights: counters, and the network that it follows."""
    averaged = any(name.startswith("ema_model.") for name in weights)
    for name in [name for name in weights if name not in expected]:
        if name in COUNTERS or (averaged and name.startswith(OTHER_MODEL)):
            del weights[name]


def strip_prefixes(weights: dict[str, Any], expected: Collection[str]) -> str:
    """Rename tensors in place to a network's names, where a wrapper put its own before them all; returns what was taken off, "" where nothing fits.

    Where that does not do, layers may be compiled in the one and not in the other: names are matched without what torch.compile puts in their middle.
    """
    taken = _prefix(weights, expected)
    if taken is None:
        own, names = {uncompiled(name): name for name in expected}, {uncompiled(name) for name in weights}
        taken = _prefix(names, own)
        if taken is None or len(names) < len(weights):
            return ""
        for name in list(weights):
            weights[taken + own[uncompiled(name).removeprefix(taken)]] = weights.pop(name)
    if taken:
        for name in list(weights):
            weights[name.removeprefix(taken)] = weights.pop(name)
        logger.info("took %r off the names of all tensors", taken)
    return taken


def uncompiled(name: str) -> str:
    """The name of a tensor or module as it would be if nothing was compiled."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def _prefix(given: Collection[str], expected: Collection[str]) -> str | None:
    """What wrappers put before all names; None where none of theirs makes them a network's."""
    names, taken = list(given), ""
    while names and not set(names) <= set(expected):
        prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in names)), None)
        if prefix is None:
            return None
        names, taken = [name.removeprefix(prefix) for name in names], taken + prefix
    return taken
