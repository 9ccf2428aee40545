"""What a caller passes to a Generator, checked at the border and turned into the arrays the graphs read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scm_runtime.bundle.manifest import Manifest
from scm_runtime.bundle.solver_tables import SolverStages
from scm_runtime.common.checks import is_int
from scm_runtime.errors import InvalidArgumentError, OutOfMemoryError
from scm_runtime.inputs.conditioning import broadcast_to_batch, dynamic_sizes, read_input, to_array

Labels = int | str | Sequence[int | str] | NDArray[np.integer[Any]]
Seeds = int | Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Call:
    """The resolved arguments of one call, for a batch of N."""

    seeds: NDArray[np.int64]  #                      [N]
    conditioning: dict[str, NDArray[Any]]  #         each [N, ...]
    evaluations: SolverStages  #                      of the step graph, in order
    latents: NDArray[np.float32] | None  #           [N, *sample], standard normal

    def ends_a_step(self, k: int) -> bool:
        """Whether evaluation k, from 0, is the last of its step."""
        return k + 1 == len(self.evaluations) or self.evaluations[k + 1].weights is None

    def step_of(self, k: int) -> tuple[int, float]:
        """The step that evaluation k is of: its index, and the time it begins at."""
        begins = [one.t for one in self.evaluations[: k + 1] if one.weights is None]
        return len(begins) - 1, begins[-1]

    @property
    def steps(self) -> int:
        """Their number."""
        return sum(one.weights is None for one in self.evaluations)


def resolve_call(
    manifest: Manifest,
    *,
    conditioning: Mapping[str, Any],
    seed: Seeds | None,
    batch_size: int | None,
    latents: ArrayLike | None,
    evaluations: SolverStages,
) -> Call:
    """Check a call's arguments against the manifest and bring them to one batch size; raises InvalidArgumentError.

    ``conditioning`` is by the names of the step graph's inputs; None stands for not given. ``evaluations`` come from the bundle's SolverTables.
    """
    if batch_size is not None and (not is_int(batch_size) or batch_size < 1):
        raise InvalidArgumentError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    inputs = {item.name: item for item in manifest.conditioning}
    for name, value in conditioning.items():
        if value is not None and name not in inputs:
            takes = ", ".join(inputs) or "no conditioning"
            raise InvalidArgumentError(f"{name} was given, but the bundle {manifest.name!r} takes {takes}")
    start = None if latents is None else read_latents(latents, manifest.sample.shape)
    given = {name: conditioning.get(name) for name in inputs}
    columns = {name: None if value is None else read_input(inputs[name], value) for name, value in given.items()}
    sizes = dynamic_sizes(inputs, columns)
    listed: Sequence[int] | None = None if seed is None or is_int(seed) else read_seeds(seed)

    lengths = {name: column.length for name, column in columns.items() if column is not None and column.length is not None}
    lengths |= {} if listed is None else {"seed": len(listed)}
    lengths |= {} if start is None else {"latents": len(start)}
    lengths |= {} if batch_size is None else {"batch_size": int(batch_size)}
    if len(set(lengths.values())) > 1:
        listing = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise InvalidArgumentError(f"all arguments must be for one batch size, got {listing}")
    n = next(iter(lengths.values()), 1)
    if n < 1:
        raise InvalidArgumentError(f"{next(iter(lengths))} must hold at least one value, got none")

    if listed is None:
        first = random_seed() if seed is None else int(cast(int, seed))
        listed = range(first, first + n)
    check_range(listed)
    try:
        seeds = np.arange(n, dtype=np.int64) + listed[0] if isinstance(listed, range) else np.array(listed, np.int64)
    except (MemoryError, ValueError) as error:
        raise OutOfMemoryError(f"{n} seeds do not fit into memory. Try a smaller batch.") from error
    filled = {name: broadcast_to_batch(inputs[name], column, seeds, sizes) for name, column in columns.items()}
    return Call(seeds, filled, evaluations, start)


def gather_conditioning(others: Mapping[str, Any] | None, **named: Any) -> dict[str, Any]:
    """Conditioning from a call's named arguments (None: not given) and its mapping of others; raises InvalidArgumentError."""
    if others is None:
        return named
    if not isinstance(others, Mapping):
        raise InvalidArgumentError(f"conditioning must be a dict of the model's inputs by name, got {type(others).__name__}")
    if twice := [str(name) for name in others if named.get(name) is not None]:
        raise InvalidArgumentError(f"{', '.join(twice)} must be given once, got it in conditioning too")
    return named | dict(others)


def random_seed() -> int:
    """A seed where none is given; short, so that it can be told."""
    return int.from_bytes(os.urandom(4), "big") >> 1


def read_seeds(seed: object) -> list[int]:
    """Seeds, one a sample, that may be out of range; raises InvalidArgumentError."""
    items = np.asarray(seed).tolist() if isinstance(seed, np.ndarray) else seed
    if isinstance(items, str) or not isinstance(items, Sequence) or not all(is_int(item) for item in items):
        raise InvalidArgumentError(f"seed must be an integer or a list of integers, got {seed!r}")
    return [int(item) for item in items]


def check_range(seeds: Sequence[int]) -> None:
    """Raise InvalidArgumentError if one of them does not fit into 64 bits."""
    for value in (seeds[0], seeds[-1]) if isinstance(seeds, range) else seeds:
        if not -(2**63) <= value < 2**63:
            raise InvalidArgumentError(f"seed must lie in [-2^63, 2^63), got {value}")


def read_latents(latents: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A state ``[N, *shape]`` from a caller; raises InvalidArgumentError."""
    array = to_array("latents", latents)
    if array.ndim != len(shape) + 1 or array.shape[1:] != tuple(shape):
        raise InvalidArgumentError(f"latents must have shape [N, {', '.join(map(str, shape))}], got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise InvalidArgumentError("latents must be finite, got NaN or infinity")
    return array
