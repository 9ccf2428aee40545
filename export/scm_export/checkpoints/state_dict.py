"""Maps the tensor names of a ``state_dict`` to those of a network."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

logger = logging.getLogger("scm_export")

AVERAGED_MODEL = "ema_model."
TRAINED_MODELS = ("online_model.", "model.")  # prefixes of the network in training beside AVERAGED_MODEL: ema-pytorch's, and Lightning modules with both
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "unet.", AVERAGED_MODEL)  # DistributedDataParallel, torch.compile, common wrappers
COMPILED = "_orig_mod"  # name of the original module inside a compiled one

# Bookkeeping that moving averages store beside the weights: torch's AveragedModel, LDM's LitEma, ema-pytorch.
COUNTERS = ("n_averaged", "decay", "num_updates", "initted", "step")


def drop_bookkeeping(weights: dict[str, Any], expected: Collection[str]) -> None:
    """Remove, in place, what a moving average stores beside its weights: counters, and the network that it averages."""
    averaged = any(name.startswith(AVERAGED_MODEL) for name in weights)
    for name in [name for name in weights if name not in expected]:
        if name in COUNTERS or (averaged and name.startswith(TRAINED_MODELS)):
            del weights[name]


def strip_prefixes(weights: dict[str, Any], expected: Collection[str]) -> str:
    """Remove the prefixes that wrappers put before all tensor names, in place, if the names then are those of the network.

    Otherwise names are also matched without the parts that torch.compile inserts, since layers may be compiled in the checkpoint or in the network only.

    Returns:
        The removed prefix; "" if no prefix was removed or the names do not match.
    """
    removed = _prefix(weights, expected)
    if removed is None:
        own, names = {uncompiled(name): name for name in expected}, {uncompiled(name) for name in weights}
        removed = _prefix(names, own)
        if removed is None or len(names) < len(weights):
            return ""
        for name in list(weights):
            weights[removed + own[uncompiled(name).removeprefix(removed)]] = weights.pop(name)
    if removed:
        for name in list(weights):
            weights[name.removeprefix(removed)] = weights.pop(name)
        logger.info("removed the prefix %r from the names of all tensors", removed)
    return removed


def uncompiled(name: str) -> str:
    """Remove the parts that torch.compile inserts into the name of a tensor or module."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def _prefix(given: Collection[str], expected: Collection[str]) -> str | None:
    """Return the prefix of wrappers before all names; None if removing known prefixes does not give the expected names."""
    names, removed = list(given), ""
    while names and not set(names) <= set(expected):
        prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in names)), None)
        if prefix is None:
            return None
        names, removed = [name.removeprefix(prefix) for name in names], removed + prefix
    return removed
