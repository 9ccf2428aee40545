"""Bare tensors: a ``state_dict`` alone, or in a dict with other things of a training run. What they are a ``--config`` file says."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from scm_runtime.errors import CheckpointError

logger = logging.getLogger("scm_export")

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "unet.")  # DistributedDataParallel, torch.compile, and wrappers by custom
COMPILED = "_orig_mod"  # the name of the module inside a compiled one
DEPTH = 2  # of dicts in dicts


def select_tensors(raw: object, source: Path) -> tuple[dict[str, Tensor], str]:
    """The one dict of tensors in a file, and the key it lay under, "" for the file itself.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    found = list(_dicts_of_tensors(raw, ()))
    if len(found) == 1:
        path, tensors = found[0]
        return tensors, ".".join(path)
    if found:
        access = "".join(f"[{key!r}]" for key in found[0][0])
        raise CheckpointError(
            f"'{source}' holds more than one set of weights: {', '.join('.'.join(path) for path, _ in found)}. "
            f"Save the one to sample with (usually the moving average) alone: "
            f"torch.save(torch.load('{source.name}'){access}, 'weights.pt')"
        )
    what = f"a dict with the keys {', '.join(map(str, list(raw)[:8]))}" if isinstance(raw, dict) else f"a {type(raw).__name__}"
    raise CheckpointError(f"'{source}' must hold a dict of tensors by name, as state_dict() returns it, got {what}")


def _dicts_of_tensors(raw: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    if not isinstance(raw, dict) or (path and "optim" in path[-1].lower()):  # an optimizer's state has names of its own
        return
    if raw and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in raw.items()):
        yield path, dict(raw)
    elif len(path) < DEPTH:
        for key, value in raw.items():
            yield from _dicts_of_tensors(value, (*path, str(key)))


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
