"""Validation of a call's arguments, and their conversion to the arrays that the graphs read."""

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
from scm_runtime.common.memory import SMALLER_BATCH, out_of_memory_error
from scm_runtime.errors import InvalidArgumentError
from scm_runtime.inputs.arguments import Seeds
from scm_runtime.inputs.conditioning import broadcast_to_batch, dynamic_sizes, read_input, to_array


@dataclass(frozen=True)
class Call:
    """Resolved arguments of one call, for a batch of N samples."""

    seeds: NDArray[np.int64]  #                      [N]
    conditioning: dict[str, NDArray[Any]]  #         each [N, ...]
    evaluations: SolverStages  #                      evaluations of the step graph, in order
    latents: NDArray[np.float32] | None  #           [N, *sample], standard normal

    def ends_a_step(self, k: int) -> bool:
        """Return True if evaluation k (from 0) is the last one of its step."""
        return k + 1 == len(self.evaluations) or self.evaluations[k + 1].weights is None

    def step_of(self, k: int) -> tuple[int, float]:
        """Index and start time of the step that evaluation k (from 0) belongs to."""
        begins = [one.t for one in self.evaluations[: k + 1] if one.weights is None]
        return len(begins) - 1, begins[-1]

    @property
    def steps(self) -> int:
        """Number of steps."""
        return sum(one.weights is None for one in self.evaluations)


def resolve_call(
    manifest: Manifest,
    *,
    conditioning: Mapping[str, object],
    seed: Seeds | None,
    batch_size: int | None,
    latents: ArrayLike | None,
    evaluations: SolverStages,
) -> Call:
    """Check a call's arguments against the manifest and broadcast them to one batch size; raises InvalidArgumentError.

    ``conditioning`` has the names of the step graph's inputs as keys. ``evaluations`` come from the bundle's SolverTables.
    """
    if batch_size is not None and (not is_int(batch_size) or batch_size < 1):
        raise InvalidArgumentError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    inputs = {item.name: item for item in manifest.conditioning}
    if not conditioning.keys() <= inputs.keys():
        name = next(name for name in conditioning if name not in inputs)
        raise InvalidArgumentError(f"{name} was given, but the bundle {manifest.name!r} takes {', '.join(inputs) or 'no conditioning'}")
    start = None if latents is None else read_latents(latents, manifest.sample.shape)
    batched = {name: read_input(item, conditioning[name]) for name, item in inputs.items() if name in conditioning}
    sizes = dynamic_sizes(inputs, batched)
    listed = None if seed is None or is_int(seed) else read_seeds(seed)

    lengths = {name: len(item.values) for name, item in batched.items() if not item.broadcast}
    if listed is not None:
        lengths["seed"] = len(listed)
    if start is not None:
        lengths["latents"] = len(start)
    if batch_size is not None:
        lengths["batch_size"] = int(batch_size)
    n = _common_length(lengths) if lengths else 1
    seeds = _seed_array(seed, n) if listed is None else _seeds_in_range(listed)
    arrays = {name: broadcast_to_batch(item, batched.get(name), seeds, sizes) for name, item in inputs.items()}
    return Call(seeds, arrays, evaluations, start)


def _common_length(lengths: Mapping[str, int]) -> int:
    """Return the batch size of arguments that are given per sample; raises InvalidArgumentError if they differ or are empty."""
    n = next(iter(lengths.values()))
    if any(length != n for length in lengths.values()):
        listing = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise InvalidArgumentError(f"all arguments must be for one batch size, got {listing}")
    if n < 1:
        raise InvalidArgumentError(f"{next(iter(lengths))} must hold at least one value, got none")
    return n


def _seed_array(seed: Seeds | None, n: int) -> NDArray[np.int64]:
    """Return the seeds of n samples that begin with an integer, or with a random one: int64 ``[n]``. Raises InvalidArgumentError."""
    first = random_seed() if seed is None else int(cast(int, seed))
    check_range((first, first + n - 1))
    if n == 1:
        return np.array([first], np.int64)
    try:
        return np.arange(n, dtype=np.int64) + first
    except (MemoryError, ValueError) as error:
        raise out_of_memory_error(f"the seeds of a batch of {n}", error, SMALLER_BATCH) from error


def _seeds_in_range(seeds: Sequence[int]) -> NDArray[np.int64]:
    check_range(seeds)
    return np.array(seeds, np.int64)


def random_seed() -> int:
    """Return a random seed, of 31 bits so that it is short to note down."""
    return int.from_bytes(os.urandom(4), "big") >> 1


def read_seeds(seed: object) -> list[int]:
    """Return seeds as a list, one per sample, without a check of their range; raises InvalidArgumentError."""
    items = np.asarray(seed).tolist() if isinstance(seed, np.ndarray) else seed
    if isinstance(items, str) or not isinstance(items, Sequence) or not all(is_int(item) for item in items):
        raise InvalidArgumentError(f"seed must be an integer or a list of integers, got {seed!r}")
    return [int(item) for item in items]


def check_range(seeds: Sequence[int]) -> None:
    """Raise InvalidArgumentError if a seed does not fit into 64 bits."""
    for value in (seeds[0], seeds[-1]) if isinstance(seeds, range) else seeds:
        if not -(2**63) <= value < 2**63:
            raise InvalidArgumentError(f"seed must lie in [-2^63, 2^63), got {value}")


def read_latents(latents: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return latents as float32 ``[N, *shape]``; raises InvalidArgumentError."""
    array = to_array("latents", latents)
    if array.ndim != len(shape) + 1 or array.shape[1:] != tuple(shape):
        raise InvalidArgumentError(f"latents must have shape [N, {', '.join(map(str, shape))}], got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise InvalidArgumentError("latents must be finite, got NaN or infinity")
    return array
