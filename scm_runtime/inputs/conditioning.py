"""Validation of conditioning, and its conversion to the arrays ``[N, *shape]`` that the step graph reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.manifest import Conditioning
from scm_runtime.common.checks import is_int
from scm_runtime.errors import InvalidArgumentError

PLACEHOLDER_SIZE = 7  # size of dynamic dimensions in placeholder_conditioning


class BatchedInput(NamedTuple):
    """A validated value for one input."""

    values: NDArray[Any]
    """``[N, *shape]``, or ``[*shape]`` if it is broadcast."""
    broadcast: bool
    """True if one value applies to all samples."""

    @property
    def length(self) -> int | None:
        """Batch size N; None if the value is broadcast."""
        return None if self.broadcast else len(self.values)


def read_input(item: Conditioning, value: object) -> BatchedInput:
    """Validate a caller's value for an input; raises InvalidArgumentError."""
    if item.kind == "class":
        return _classes(item, value)
    if item.kind == "scalar":
        return _scalars(item, value)
    return _arrays(item, value)


def _classes(item: Conditioning, value: Any) -> BatchedInput:
    if isinstance(value, str) or is_int(value):
        return BatchedInput(cast("NDArray[np.int64]", np.int64(class_index(item, value))), broadcast=True)
    labels = np.asarray(value, object).tolist()
    if not isinstance(labels, list):
        raise InvalidArgumentError(f"{item.name} must be class indices or label names, got {value!r}")
    return BatchedInput(np.array([class_index(item, label) for label in labels], np.int64), broadcast=False)


def class_index(item: Conditioning, label: object) -> int:
    """Index of a class, from its index or its name; raises InvalidArgumentError."""
    classes = cast(int, item.num_classes)
    if isinstance(label, str):
        names = item.label_names or ()
        if label in names:
            return names.index(label)
        known = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
        expected = f"one of its {len(names)} label names ({known})" if names else f"an index from 0 to {classes - 1}: the bundle has no label names"
        raise InvalidArgumentError(f"{item.name} must be {expected}, got {label!r}")
    if not is_int(label):
        raise InvalidArgumentError(f"{item.name} must be from 0 to {classes - 1} and of an integer type, got {label!r} ({type(label).__name__})")
    if not 0 <= cast(int, label) < classes:
        raise InvalidArgumentError(f"{item.name} must be from 0 to {classes - 1}, got {label!r}")
    return int(cast(int, label))


def _scalars(item: Conditioning, value: Any) -> BatchedInput:
    try:
        numbers = np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{item.name} must be a number or one per sample, got {value!r}") from error
    if numbers.ndim > 1 or not np.isfinite(numbers).all():
        raise InvalidArgumentError(f"{item.name} must be a finite number or one per sample, got {value!r}")
    return BatchedInput(numbers, broadcast=not numbers.ndim)


def _arrays(item: Conditioning, value: Any) -> BatchedInput:
    array = to_array(item.name, value)
    broadcast = array.ndim == len(item.shape)
    sizes = array.shape if broadcast else array.shape[1:]
    if len(sizes) != len(item.shape) or any(
        size != expected if isinstance(expected, int) else size < 1 for size, expected in zip(sizes, item.shape, strict=True)
    ):
        raise InvalidArgumentError(f"{item.name} must have the shape {_shape(item.shape)} or {_shape(('N', *item.shape))}, got {list(array.shape)}")
    if not broadcast and not len(array):
        return BatchedInput(array, broadcast)  # resolve_call rejects an empty batch
    if item.kind == "embedding":
        if not np.isfinite(array).all():
            raise InvalidArgumentError(f"{item.name} must be finite, got NaN or infinity")
        return BatchedInput(array, broadcast)
    if not np.isin(array, (0, 1)).all():
        raise InvalidArgumentError(f"{item.name} must hold ones and zeros only, got {array[~np.isin(array, (0, 1))][0]:g}")
    if not array.reshape(1 if broadcast else len(array), -1).any(axis=1).all():
        raise InvalidArgumentError(f"{item.name} must have at least one 1 per sample, got only zeros for a sample")
    return BatchedInput(array.astype(np.int64), broadcast)


def to_array(name: str, value: Any) -> NDArray[np.float32]:
    """Return an array of any real dtype as float32; raises InvalidArgumentError."""
    try:
        raw = np.asarray(value)
        if raw.dtype.kind in "cSU":
            raise TypeError(f"{raw.dtype} is not a real dtype")
        with np.errstate(over="ignore"):  # values beyond float32's range become infinity, which callers reject
            return np.ascontiguousarray(raw, np.float32).reshape(raw.shape)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError is torch's for tensors that require gradients
        hint = ". Convert a torch tensor first: tensor.detach().float().cpu().numpy()" if type(value).__module__.startswith("torch") else ""
        raise InvalidArgumentError(f"{name} must be an array of numbers, got {type(value).__name__} ({error}){hint}") from error


def dynamic_sizes(inputs: Mapping[str, Conditioning], values: Mapping[str, BatchedInput]) -> dict[str, int]:
    """Sizes of the dynamic dimensions in one call, by name; raises InvalidArgumentError if two inputs differ."""
    sizes: dict[str, int] = {}
    owners: dict[str, str] = {}
    for name, value in values.items():
        if not inputs[name].shape:
            continue
        shape = value.values.shape if value.broadcast else value.values.shape[1:]
        for dimension, size in zip(inputs[name].shape, shape, strict=True):
            if not isinstance(dimension, str):
                continue
            if sizes.setdefault(dimension, size) != size:
                first = owners[dimension]
                shapes = " and ".join(f"{other} {list(values[other].values.shape)}" for other in (first, name))
                raise InvalidArgumentError(f"{first} and {name} must have the same number of {dimension}, got {sizes[dimension]} and {size}, in {shapes}")
            owners.setdefault(dimension, name)
    return sizes


def broadcast_to_batch(item: Conditioning, value: BatchedInput | None, seeds: NDArray[np.int64], sizes: Mapping[str, int]) -> NDArray[Any]:
    """Array of one input for a batch, ``[N, *shape]``: the given value or the default. Raises InvalidArgumentError if there is neither.

    By default a class label is the seed modulo the number of classes, and a mask is all ones. ``sizes`` are those of the dynamic dimensions.
    """
    if value is not None:
        if not value.broadcast:
            return np.ascontiguousarray(value.values)
        return np.repeat(value.values[None], len(seeds), 0)
    if item.is_array:
        unknown = [dimension for dimension in item.shape if isinstance(dimension, str) and dimension not in sizes]
        if item.kind == "embedding" or unknown:
            raise InvalidArgumentError(_missing_array(item))
        return np.ones((len(seeds), *(sizes[dimension] if isinstance(dimension, str) else dimension for dimension in item.shape)), np.int64)
    if item.default is not None:
        return np.full(seeds.shape, item.default, item.dtype)
    if item.kind == "class":
        return seeds % cast(int, item.num_classes)
    raise InvalidArgumentError(f"this bundle needs {item.name}: a number, or one per sample")


def placeholder_conditioning(inputs: Sequence[Conditioning], seeds: Sequence[int]) -> dict[str, Any]:
    """Return values for each input that has no default: 1 for a scalar, and standard normal values that follow from the sample's seed for an embedding."""
    given: dict[str, Any] = {}
    for item in inputs:
        if item.kind == "embedding":
            shape = [PLACEHOLDER_SIZE if isinstance(size, str) else size for size in item.shape]
            given[item.name] = np.stack([np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in seeds])
        elif item.kind == "scalar" and item.default is None:
            given[item.name] = 1.0
    return given


def _missing_array(item: Conditioning) -> str:
    message = f"this bundle needs {item.name}: {item.describe()}, or {_shape(item.shape)} for all samples"
    if item.name != "prompt_embeds":
        return f"{message}. Give it in conditioning={{{item.name!r}: …}}"
    return f"{message}, from the model's text encoder. On the command line: --prompt-embeds FILE.npz"


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
