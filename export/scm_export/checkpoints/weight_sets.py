"""The sets of weights in a training checkpoint, and the one to export: the one asked for, the only one, or the only moving average."""

from __future__ import annotations

import difflib
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from scm_export.checkpoints.printable import printable
from scm_export.errors import CheckpointError
from scm_runtime.errors import InvalidArgumentError

MAX_DEPTH = 4  # of dicts in dicts: Lightning's callbacks keep an average at callbacks.NAME.ema_state_dict
MAX_LISTED = 20

# Words in the key of a moving average: "model_ema", "netEMA", "ema_0.9999"; and those that say that it is none: "non_ema".
AVERAGE = {"ema", "average", "averaged", "avg", "shadow", "swa"}
NO_AVERAGE = {"non", "no", "not", "grad", "grads", "gradient", "loss", "disc", "discriminator", "critic"}


@dataclass(frozen=True)
class WeightSet:
    """A dict of tensors by name, and where in the file it is."""

    path: tuple[str, ...]
    tensors: dict[str, Tensor]

    @property
    def key(self) -> str:
        """Its dotted key, as ``--weights`` takes it; "" for the file itself."""
        return ".".join(self.path)

    def describe(self) -> str:
        """Its size, in words."""
        count = len(self.tensors)
        return f"{count:,} tensor{'s' * (count != 1)}, {sum(tensor.numel() for tensor in self.tensors.values()):,} parameters"


def choose_weights(raw: object, source: Path, key: str | None, progress: Callable[[str], None]) -> WeightSet:
    """The set of weights with a key; without one, the only set, or the only moving average among several.

    Raises:
        CheckpointError: there is none, or none of several is the only moving average.
        InvalidArgumentError: no set has this key, or the file has no choice.
    """
    sets = list(_weight_sets(raw))
    if not sets:
        what = f"a dict with the keys {', '.join(map(printable, list(raw)[:8]))}" if isinstance(raw, dict) else f"a {type(raw).__name__}"
        raise CheckpointError(f"'{source}' must hold a dict of tensors by name, as state_dict() returns it, got {what}")
    if key is not None:
        chosen = _with_key(sets, key, source)
    elif average := _unreadable_average(raw, sets):
        raise CheckpointError(
            f"'{source}' keeps a moving average under {average!r} in a form without names, such as a list of tensors, which cannot be put into the network. "
            f"Save its state_dict, or choose another set:\n{_listing(sets)}"
        )
    elif len(sets) == 1:
        chosen = sets[0]
    else:
        chosen = _only_average(sets, source)
        progress(f"taking the moving average under {chosen.key!r}, one of {len(sets)} sets of weights (--weights KEY takes another)")
        return chosen
    if chosen.key:
        progress(f"taking the tensors under {chosen.key!r}")
    return chosen


def _with_key(sets: Sequence[WeightSet], key: str, source: Path) -> WeightSet:
    if not sets[0].path:
        raise InvalidArgumentError(f"'{source}' is one set of weights and has no choice of them: leave out the weights, got {key!r}")
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
    """Whether a part of a key, read word by word, names a moving average."""
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)}
    return bool(words & AVERAGE) and not words & NO_AVERAGE


def _listing(sets: Sequence[WeightSet]) -> str:
    """A line a set, each with the option that chooses it."""
    options = [f"--weights {shlex.quote(one.key)}" for one in sets[:MAX_LISTED]]
    width = max(map(len, options))
    lines = [f"  {option:{width}}  {one.describe()}" for option, one in zip(options, sets, strict=False)]
    return "\n".join([*lines, *([f"  and {len(sets) - MAX_LISTED} more"] if len(sets) > MAX_LISTED else [])])


# ----------------------------------------------------------------------------
# What in a file is a set of weights.


def _weight_sets(raw: object) -> Iterator[WeightSet]:
    """Every dict of tensors that may be a network's, in the file's order. A dict in several places is looked through in the first."""
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
    """Whether a dict is the state of an optimizer, whose tensors are named as it likes."""
    return bool(path and "optim" in path[-1].lower()) or {"state", "param_groups"} <= value.keys()


def _as_weights(value: dict[object, object], *, beside_others: bool) -> dict[str, Tensor] | None:
    """The tensors of a dict that holds tensors by name, and perhaps numbers; None for another.

    Beside other things one tensor at least must be an array of real numbers: states of random generators and lists of scores are not weights.
    """
    named = {name: tensor for name, tensor in dict.items(value) if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not named or not all(isinstance(other, Tensor | int | float | str | None) and isinstance(name, str) for name, other in dict.items(value)):
        return None
    arrays = any(tensor.is_floating_point() and tensor.ndim for tensor in named.values())
    return named if arrays or not (beside_others or len(named) < len(value)) else None


def _unreadable_average(raw: object, sets: Sequence[WeightSet]) -> str | None:
    """Key of a moving average that holds tensors and no set of weights; None where there is none."""
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


def _holds_array(value: object, depth: int = 0) -> bool:
    """Whether there is a tensor with axes in nested containers."""
    if isinstance(value, Tensor):
        return value.ndim > 0
    items = list(dict.values(value)) if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return depth < MAX_DEPTH and any(_holds_array(item, depth + 1) for item in items)
