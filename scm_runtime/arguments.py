"""What a caller passes to a Generator, checked at the border and turned into the arrays the graphs read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scm_runtime.bundle import Conditioning, Manifest
from scm_runtime.errors import InvalidArgumentError

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
    class_labels: Labels | None,
    guidance_scale: float | Sequence[float] | None,
    seed: Seeds | None,
    batch_size: int | None,
    latents: ArrayLike | None,
    num_inference_steps: int | None,
    timesteps: Sequence[float] | None,
    output_type: str,
) -> Call:
    """Check a call's arguments against the manifest and bring them to one batch size; raises InvalidArgumentError."""
    if output_type not in ("pil", "np", "latent"):
        raise InvalidArgumentError(f"output_type must be 'pil', 'np' or 'latent', got {output_type!r}")
    if batch_size is not None and (not _is_int(batch_size) or batch_size < 1):
        raise InvalidArgumentError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    given: dict[str, Any] = {"class_labels": class_labels, "guidance_scale": guidance_scale}
    inputs = {item.name: item for item in manifest.conditioning}
    for name, value in given.items():
        if value is not None and name not in inputs:
            takes = ", ".join(inputs) or "no conditioning"
            raise InvalidArgumentError(f"{name} was given, but the bundle {manifest.name!r} takes {takes}")
    start = None if latents is None else _latents(latents, manifest.sample.shape)
    columns = {name: _column(item, given.get(name)) for name, item in inputs.items()}
    listed = None if seed is None or _is_int(seed) else _integers("seed", seed)

    lengths = {name: len(column) for name, column in columns.items() if column is not None and column.ndim}
    lengths |= {} if listed is None else {"seed": len(listed)}
    lengths |= {} if start is None else {"latents": len(start)}
    lengths |= {} if batch_size is None else {"batch_size": int(batch_size)}
    if len(set(lengths.values())) > 1:
        sizes = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise InvalidArgumentError(f"all arguments must be for one batch size, got {sizes}")
    n = next(iter(lengths.values()), 1)
    if n < 1:
        raise InvalidArgumentError(f"{next(iter(lengths))} must hold at least one value, got none")

    if listed is None:
        first = int.from_bytes(os.urandom(4), "big") >> 1 if seed is None else int(cast(int, seed))
        listed = [first + i for i in range(n)]
    for value in listed:
        if not -(2**63) <= value < 2**63:
            raise InvalidArgumentError(f"seed must lie in [-2^63, 2^63), got {value}")
    seeds = np.array(listed, np.int64)
    conditioning = {name: _fill(inputs[name], column, seeds) for name, column in columns.items()}
    return Call(seeds, conditioning, _times(manifest, num_inference_steps, timesteps), start)


def _is_int(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool | np.bool_)


def _integers(name: str, values: object) -> list[int]:
    items = np.asarray(values).tolist() if isinstance(values, np.ndarray) else values
    if isinstance(items, str) or not isinstance(items, Sequence) or not all(_is_int(item) for item in items):
        raise InvalidArgumentError(f"{name} must be an integer or a list of integers, got {values!r}")
    return [int(item) for item in items]


def _column(item: Conditioning, value: Any) -> NDArray[Any] | None:
    """A conditioning argument as a checked array: a scalar for all samples, or one value a sample; None where none was given."""
    if value is None:
        return None
    if item.kind == "class":
        labels = [value] if isinstance(value, str) or _is_int(value) else np.asarray(value, object).tolist()
        if not isinstance(labels, list):
            raise InvalidArgumentError(f"{item.name} must be class indices or label names, got {value!r}")
        indices = np.array([class_index(item, label) for label in labels], np.int64)
        return indices[0] if isinstance(value, str) or _is_int(value) else indices
    try:
        numbers = np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{item.name} must be a number or one a sample, got {value!r}") from error
    if numbers.ndim > 1 or not np.isfinite(numbers).all():
        raise InvalidArgumentError(f"{item.name} must be a finite number or one a sample, got {value!r}")
    return numbers


def class_index(item: Conditioning, label: object) -> int:
    """Index of a class given by number or by name; raises InvalidArgumentError."""
    classes = cast(int, item.num_classes)
    if isinstance(label, str):
        names = item.label_names or ()
        if label in names:
            return names.index(label)
        known = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
        expected = f"one of its {len(names)} label names ({known})" if names else f"an index from 0 to {classes - 1}: the bundle has no label names"
        raise InvalidArgumentError(f"{item.name} must be {expected}, got {label!r}")
    if not _is_int(label) or not 0 <= cast(int, label) < classes:
        raise InvalidArgumentError(f"{item.name} must be from 0 to {classes - 1}, got {label!r}")
    return int(cast(int, label))


def _fill(item: Conditioning, column: NDArray[Any] | None, seeds: NDArray[np.int64]) -> NDArray[Any]:
    if column is not None:
        return np.ascontiguousarray(np.broadcast_to(column, seeds.shape))
    if item.default is not None:
        return np.full(seeds.shape, item.default, item.dtype)
    if item.kind == "class":
        return seeds % cast(int, item.num_classes)
    raise InvalidArgumentError(f"this bundle needs {item.name}: a number, or one a sample")


def _latents(latents: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float32]:
    try:
        array = np.ascontiguousarray(latents, np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"latents must be an array of numbers, got {type(latents).__name__}") from error
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
            raise InvalidArgumentError(f"timesteps must be decreasing, above {end:g} and at most {largest:g}, got {times}")
        return (*times, end)
    if steps is None:
        steps = DEFAULT_STEPS if DEFAULT_STEPS in counts else counts[0]
    if not _is_int(steps) or steps < 1:
        raise InvalidArgumentError(f"num_inference_steps must be an integer of at least 1, got {steps!r}")
    if int(steps) not in counts:
        raise InvalidArgumentError(
            f"num_inference_steps must be one of {counts}, the counts this bundle has times for; got {steps}. "
            f"For others give timesteps=[…], decreasing from {max(map(max, manifest.times.values())):.6g}."
        )
    return manifest.times[str(int(steps))]
