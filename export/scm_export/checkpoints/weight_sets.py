"""Finds the sets of weights in a training checkpoint and selects the one to export: the requested one, the only one, or the only moving average."""

from __future__ import annotations

import difflib
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from scm_export.errors import CheckpointError
from scm_runtime.common.message_text import printable
from scm_runtime.errors import InvalidArgumentError

MAX_DEPTH = 4  # nesting of dicts; Lightning callbacks store an average at callbacks.NAME.ema_state_dict
MAX_LISTED = 20

# Words in the key of a moving average, such as "model_ema", "netEMA" and "ema_0.9999"; and words in keys of other things, such as "non_ema".
AVERAGE_WORDS = {"ema", "average", "averaged", "avg", "shadow", "swa"}
NON_AVERAGE_WORDS = {"non", "no", "not", "grad", "grads", "gradient", "loss", "disc", "discriminator", "critic"}


@dataclass(frozen=True)
class WeightSet:
    """A dict of tensors by name, and its location in the file."""

    path: tuple[str, ...]
    tensors: dict[str, Tensor]

    @property
    def key(self) -> str:
        """Dotted key, the value of ``--weights`` that selects this set; "" if the set is the whole file."""
        return ".".join(self.path)

    def describe(self) -> str:
        """Description of the size for listings: number of tensors and parameters."""
        count = len(self.tensors)
        return f"{count:,} tensor{'s' * (count != 1)}, {sum(tensor.numel() for tensor in self.tensors.values()):,} parameters"


def choose_weights(raw: object, source: Path, key: str | None, progress: Callable[[str], None]) -> WeightSet:
    """Select a set of weights: by key, or if key is None the only set, or the only moving average among several.

    Args:
        raw: contents of the file.
        source: path of the file, for messages.
        key: dotted key of the set, or None.
        progress: called with a message that names the selected set.

    Raises:
        CheckpointError: there is no set of weights, or several and not exactly one of them is a moving average.
        InvalidArgumentError: no set has this key, or the file is a single set without a key.
    """
    sets = list(_weight_sets(raw))
    if not sets:
        what = f"a dict with the keys {', '.join(map(printable, list(raw)[:8]))}" if isinstance(raw, dict) else f"a {type(raw).__name__}"
        raise CheckpointError(f"'{source}' must hold a dict of tensors by name, as state_dict() returns it, got {what}")
    if key is not None:
        chosen = _with_key(sets, key, source)
    elif average := _unreadable_average(raw, sets):
        raise CheckpointError(
            f"'{source}' keeps a moving average under '{average}' in a form without names, such as a list of tensors, which cannot be loaded into the network. "
            f"Save its state_dict, or choose another set:\n{_listing(sets)}"
        )
    elif len(sets) == 1:
        chosen = sets[0]
    else:
        chosen = _only_average(sets, source)
        progress(f"using the moving average under '{chosen.key}', one of {len(sets)} sets of weights (choose another with --weights KEY)")
        return chosen
    if chosen.key:
        progress(f"using the tensors under '{chosen.key}'")
    return chosen


def _with_key(sets: Sequence[WeightSet], key: str, source: Path) -> WeightSet:
    if not sets[0].path:
        raise InvalidArgumentError(f"'{source}' is a single set of weights: leave out the weights, got {key!r}")
    chosen = [one for one in sets if one.key == key]
    if len(chosen) == 1:
        return chosen[0]
    close = difflib.get_close_matches(key, [one.key for one in sets], n=1, cutoff=0.5)
    meant = f"; did you mean {close[0]!r}?" if close and not chosen else "."
    raise InvalidArgumentError(f"weights must be the key of one of the sets of weights in '{source}', got {key!r}{meant} It holds:\n{_listing(sets)}")


def _only_average(sets: Sequence[WeightSet], source: Path) -> WeightSet:
    below = Counter(one.path[:depth] for one in sets for depth in range(1, len(one.path) + 1))
    averages = [one for one in sets if any(_names_average(one.path[depth - 1]) for depth in range(1, len(one.path) + 1) if below[one.path[:depth]] == 1)]
    if len(averages) == 1:
        return averages[0]
    averages = averages or [one for one in sets if any(map(_names_average, one.path))]
    if averages:
        found = f"holds {len(averages)} moving averages among its {len(sets)} sets of weights"
    else:
        found = f"holds {len(sets)} sets of weights, and none of them is named as a moving average"
    raise CheckpointError(f"'{source}' {found}. Choose the one to sample with:\n{_listing(averages or sets)}")


def _names_average(part: str) -> bool:
    """Return True if the words of one part of a key name a moving average."""
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)}
    return bool(words & AVERAGE_WORDS) and not words & NON_AVERAGE_WORDS


def _listing(sets: Sequence[WeightSet]) -> str:
    """List the sets, one per line, each with the option that selects it."""
    options = [f"--weights {shlex.quote(one.key)}" for one in sets[:MAX_LISTED]]
    width = max(map(len, options))
    lines = [f"  {option:{width}}  {one.describe()}" for option, one in zip(options, sets, strict=False)]
    return "\n".join([*lines, *([f"  and {len(sets) - MAX_LISTED} more"] if len(sets) > MAX_LISTED else [])])


# ----------------------------------------------------------------------------
# Finding the sets of weights in a file.


def _weight_sets(raw: object) -> Iterator[WeightSet]:
    """Yield every dict of tensors that may belong to a network, in file order. A dict that occurs several times is searched only once."""
    opened = set[int]()
    checked: dict[int, dict[str, Tensor] | None] = {}
    waiting: list[tuple[tuple[str, ...], object]] = [((), raw)]
    while waiting:
        path, value = waiting.pop()
        if not isinstance(value, dict) or _is_optimizer(path, value):
            continue
        if id(value) not in checked:
            checked[id(value)] = _as_weights(value, beside_others=bool(path))
        if tensors := checked[id(value)]:
            yield WeightSet(path, tensors)
        elif len(path) < MAX_DEPTH and id(value) not in opened:
            opened.add(id(value))
            waiting += reversed([((*path, printable(key)), item) for key, item in dict.items(value) if isinstance(item, dict)])


def _is_optimizer(path: tuple[str, ...], value: dict[object, object]) -> bool:
    """Return True if a dict is the state of an optimizer, whose tensor names are arbitrary."""
    return bool(path and "optim" in path[-1].lower()) or {"state", "param_groups"} <= value.keys()


def _as_weights(value: dict[object, object], *, beside_others: bool) -> dict[str, Tensor] | None:
    """Return the tensors of a dict that holds tensors by name, and possibly plain values; None for any other dict.

    If the file or the dict holds other things too, at least one tensor must be an array of real numbers: random generator states and lists of scores
    are not weights.
    """
    named = {name: tensor for name, tensor in dict.items(value) if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not named or not all(isinstance(other, Tensor | int | float | str | None) and isinstance(name, str) for name, other in dict.items(value)):
        return None
    arrays = any(tensor.is_floating_point() and tensor.ndim for tensor in named.values())
    return named if arrays or not (beside_others or len(named) < len(value)) else None


def _unreadable_average(raw: object, sets: Sequence[WeightSet]) -> str | None:
    """Key of a moving average whose tensors have no names; None if there is none."""
    waiting: list[tuple[tuple[str, ...], object]] = [((), raw)]
    seen = set[int]()
    while waiting:
        path, value = waiting.pop()
        if path and _names_average(path[-1]) and _holds_array(value) and not any(one.path[: len(path)] == path for one in sets):
            return ".".join(path)
        if isinstance(value, dict) and len(path) < MAX_DEPTH and id(value) not in seen and not _is_optimizer(path, value):
            seen.add(id(value))
            waiting += reversed([((*path, printable(key)), item) for key, item in dict.items(value) if isinstance(item, dict | list | tuple)])
    return None


def _holds_array(value: object) -> bool:
    """Return True if nested containers hold a tensor that is not a scalar. A container that occurs several times is searched only once."""
    level, seen = [value], set[int]()
    for _ in range(MAX_DEPTH + 1):
        if any(isinstance(item, Tensor) and item.ndim > 0 for item in level):
            return True
        containers = {id(item): item for item in level if isinstance(item, dict | list | tuple) and id(item) not in seen}
        seen |= containers.keys()
        level = [item for one in containers.values() for item in (dict.values(one) if isinstance(one, dict) else one)]
    return False
