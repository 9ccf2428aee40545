"""What a caller passes to a Generator, checked at the border and turned into the arrays the graphs read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scm_runtime.bundle import Manifest
from scm_runtime.conditioning import fill, free_sizes, is_int, read_column, to_array
from scm_runtime.errors import InvalidArgumentError, OutOfMemoryError

Labels = int | str | Sequence[int | str] | NDArray[np.integer[Any]]
Seeds = int | Sequence[int] | NDArray[np.integer[Any]]

DEFAULT_STEPS = 2


@dataclass(frozen=True)
class Call:
    """The resolved arguments of one call, for a batch of N."""

    seeds: NDArray[np.int64]  #                      [N]
    conditioning: dict[str, NDArray[Any]]  #         each [N, ...]
    times: tuple[float, ...]  #                      steps + 1 values, the end time last
    latents: NDArray[np.float32] | None  #           [N, *sample], standard normal


def resolve_call(
    manifest: Manifest,
    *,
    conditioning: Mapping[str, Any],
    seed: Seeds | None,
    batch_size: int | None,
    latents: ArrayLike | None,
    num_inference_steps: int | None,
    timesteps: Sequence[float] | None,
) -> Call:
    """Check a call's arguments against the manifest and bring them to one batch size; raises InvalidArgumentError.

    ``conditioning`` is by the names of the step graph's inputs; None stands for not given.
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
    columns = {name: None if value is None else read_column(inputs[name], value) for name, value in given.items()}
    sizes = free_sizes(inputs, columns)
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
    filled = {name: fill(inputs[name], column, seeds, sizes) for name, column in columns.items()}
    return Call(seeds, filled, _times(manifest, num_inference_steps, timesteps), start)


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


def _times(manifest: Manifest, steps: int | None, timesteps: Sequence[float] | None) -> tuple[float, ...]:
    counts = sorted(int(count) for count in manifest.times)
    end = manifest.times[str(counts[0])][-1]
    if timesteps is not None:
        if steps is not None:
            raise InvalidArgumentError("give num_inference_steps or timesteps, not both")
        try:
            times = [float(t) for t in timesteps]
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(f"timesteps must be a list of numbers, got {timesteps!r}") from error
        largest = max(t for known in manifest.times.values() for t in known)
        bounded = all(end < t <= largest * (1 + 1e-6) for t in times)  # NaN fails here too
        if not times or not bounded or any(a <= b for a, b in pairwise(times)):
            raise InvalidArgumentError(f"timesteps must be decreasing, above {end:g} and at most {largest:g} ({manifest.time_unit}), got {times}")
        return (*times, end)
    if steps is None:
        steps = DEFAULT_STEPS if DEFAULT_STEPS in counts else counts[0]
    if not is_int(steps) or steps < 1:
        raise InvalidArgumentError(f"num_inference_steps must be an integer of at least 1, got {steps!r}")
    if int(steps) not in counts:
        raise InvalidArgumentError(
            f"num_inference_steps must be one of {counts}, the counts this bundle has times for; got {steps}. "
            f"For others give timesteps=[…], decreasing from {max(map(max, manifest.times.values())):.6g}."
        )
    return manifest.times[str(int(steps))]
