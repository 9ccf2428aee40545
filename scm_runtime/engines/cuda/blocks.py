"""Several tensors in one piece of a device's memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from scm_runtime.engines.cuda.stream import DeviceBuffer
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.ort.session import Region

ALIGNMENT = 256  # bytes: what cudaMalloc gives, and vectorised loads may count on

TensorSpec = tuple[type[np.generic], tuple[int, ...]]


class Layout:
    """Tensors in one piece of memory, in order, each aligned."""

    def __init__(self, fields: tuple[tuple[str, TensorSpec], ...]) -> None:
        self.fields = dict(fields)
        self.offsets: dict[str, int] = {}
        self.nbytes = {name: np.dtype(dtype).itemsize * prod(shape) for name, (dtype, shape) in fields}
        """In bytes."""
        self.total_nbytes = 0
        for name, size in self.nbytes.items():
            self.offsets[name] = self.total_nbytes
            self.total_nbytes += -(-size // ALIGNMENT) * ALIGNMENT
        self._structured: dict[tuple[str, ...], tuple[int, np.dtype[Any]]] = {}

    def structured_dtype(self, names: tuple[str, ...]) -> tuple[int, np.dtype[Any]]:
        """Some of the tensors, that stand together, as NumPy writes them at once: where the first one begins, and the dtype of all."""
        if names not in self._structured:
            first, end = min(self.offsets[name] for name in names), max(self.offsets[name] + self.nbytes[name] for name in names)
            offsets = [self.offsets[name] - first for name in names]
            dtype = np.dtype({"names": names, "formats": [self.fields[name] for name in names], "offsets": offsets, "itemsize": end - first})
            self._structured[names] = first, dtype
        return self._structured[names]


_cached_layout = lru_cache(64)(Layout)


class TensorBlock:
    """Memory with several tensors in it."""

    def __init__(self, context: CudaContext, fields: Mapping[str, TensorSpec]) -> None:
        """Allocate. Raises OutOfMemoryError."""
        self._layout, self._stream = _cached_layout(tuple(fields.items())), context.stream
        self.nbytes = self._layout.nbytes
        self._memory: DeviceBuffer = self._stream.allocate(self._layout.total_nbytes)

    def address(self, name: str) -> int:
        """Where a tensor lies."""
        return self._memory.address + self._layout.offsets[name]

    def tensor(self, name: str) -> Region:
        """A tensor, for a session to be bound to."""
        return Region(self.address(name), *self._layout.fields[name])

    def upload(self, arrays: Mapping[str, Any]) -> None:
        """Write tensors that stand together, in one copy."""
        first, dtype = self._layout.structured_dtype(tuple(arrays))
        packed = np.zeros((), dtype)
        for name, array in arrays.items():
            packed[name] = array
        self._stream.upload(self._memory.address + first, packed)
