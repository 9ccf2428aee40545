"""Several tensors in one piece of a device's memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from scm_runtime.engines.cuda.gpu import Memory
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.ort.session import Region

ALIGNMENT = 256  # bytes: what cudaMalloc gives, and vectorised loads may count on

Field = tuple[type[np.generic], tuple[int, ...]]


class Layout:
    """Tensors in one piece of memory, in order, each aligned."""

    def __init__(self, fields: tuple[tuple[str, Field], ...]) -> None:
        self.fields = dict(fields)
        self.offsets: dict[str, int] = {}
        self.sizes = {name: np.dtype(dtype).itemsize * prod(shape) for name, (dtype, shape) in fields}
        """In bytes."""
        self.end = 0
        for name, size in self.sizes.items():
            self.offsets[name] = self.end
            self.end += -(-size // ALIGNMENT) * ALIGNMENT
        self._records: dict[tuple[str, ...], tuple[int, np.dtype[Any]]] = {}

    def record(self, names: tuple[str, ...]) -> tuple[int, np.dtype[Any]]:
        """Some of the tensors, that stand together, as NumPy writes them at once: where the first one begins, and the dtype of all."""
        if names not in self._records:
            first, end = min(self.offsets[name] for name in names), max(self.offsets[name] + self.sizes[name] for name in names)
            offsets = [self.offsets[name] - first for name in names]
            dtype = np.dtype({"names": names, "formats": [self.fields[name] for name in names], "offsets": offsets, "itemsize": end - first})
            self._records[names] = first, dtype
        return self._records[names]


_layout = lru_cache(64)(Layout)


class Block:
    """Memory with several tensors in it."""

    def __init__(self, context: CudaContext, fields: Mapping[str, Field]) -> None:
        """Allocate. Raises OutOfMemoryError."""
        self._layout, self._gpu = _layout(tuple(fields.items())), context.gpu
        self.sizes = self._layout.sizes
        self._memory: Memory = self._gpu.allocate(self._layout.end)

    def address(self, name: str) -> int:
        """Where a tensor lies."""
        return self._memory.address + self._layout.offsets[name]

    def region(self, name: str) -> Region:
        """A tensor, for a session to be bound to."""
        return Region(self.address(name), *self._layout.fields[name])

    def upload(self, arrays: Mapping[str, Any]) -> None:
        """Write tensors that stand together, in one copy."""
        first, dtype = self._layout.record(tuple(arrays))
        packed = np.zeros((), dtype)
        for name, array in arrays.items():
            packed[name] = array
        self._gpu.upload(self._memory.address + first, packed)
