"""Named tensors in one allocation of device memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scm_runtime.engines.cuda.handles import DeviceBuffer, PinnedBuffer
from scm_runtime.engines.cuda.stream import CudaStream
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.ort.session import DeviceTensor

ALIGNMENT = 256  # bytes, as cudaMalloc aligns; kernels with vectorized loads rely on it

TensorSpec = tuple[type[np.generic], tuple[int, ...]]
"""Dtype and shape of a tensor."""


class Layout:
    """Offsets of tensors that lie in one allocation, in the given order, each aligned to ``ALIGNMENT``."""

    def __init__(self, fields: tuple[tuple[str, TensorSpec], ...]) -> None:
        self.fields = dict(fields)
        self.offsets: dict[str, int] = {}
        self.nbytes = {name: np.dtype(dtype).itemsize * prod(shape) for name, (dtype, shape) in fields}
        """Size of each tensor in bytes, without padding."""
        self.total_nbytes = 0
        for name, size in self.nbytes.items():
            self.offsets[name] = self.total_nbytes
            self.total_nbytes += -(-size // ALIGNMENT) * ALIGNMENT
        self._structured: dict[tuple[str, ...], tuple[int, np.dtype[Any]]] = {}

    def structured_dtype(self, names: tuple[str, ...]) -> tuple[int, np.dtype[Any]]:
        """Return the offset of the first of some adjacent tensors, and the NumPy structured dtype that holds all of them."""
        if names not in self._structured:
            first, end = min(self.offsets[name] for name in names), max(self.offsets[name] + self.nbytes[name] for name in names)
            offsets = [self.offsets[name] - first for name in names]
            dtype = np.dtype({"names": names, "formats": [self.fields[name] for name in names], "offsets": offsets, "itemsize": end - first})
            self._structured[names] = first, dtype
        return self._structured[names]


_cached_layout = lru_cache(64)(Layout)


class TensorBlock:
    """One allocation of device memory that holds several tensors."""

    def __init__(self, context: CudaContext, fields: Mapping[str, TensorSpec], *, cleared: bool = False) -> None:
        """Allocate memory for tensors of these dtypes and shapes, filled with zeros if ``cleared``. Raises OutOfMemoryError."""
        self._layout, self._stream = _cached_layout(tuple(fields.items())), context.stream
        self.nbytes = self._layout.nbytes
        self._buffer: DeviceBuffer = self._stream.allocate(self._layout.total_nbytes)
        if cleared:
            self._stream.clear(self._buffer.address, self._buffer.nbytes)

    def address(self, name: str) -> int:
        """Return the device address of a tensor."""
        return self._buffer.address + self._layout.offsets[name]

    def tensor(self, name: str) -> DeviceTensor:
        """Return a tensor's address, dtype and shape, to bind a session to it."""
        return DeviceTensor(self.address(name), *self._layout.fields[name])

    def upload(self, arrays: Mapping[str, Any]) -> None:
        """Enqueue one copy that writes some adjacent tensors from host arrays or numbers."""
        first, dtype = self._layout.structured_dtype(tuple(arrays))
        packed = np.zeros((), dtype)
        for name, array in arrays.items():
            packed[name] = array
        self._stream.upload(self._buffer.address + first, packed)

    def pinned(self, names: Sequence[str]) -> PinnedTensors:
        """Return page-locked host memory from which some adjacent tensors can be written. Raises OutOfMemoryError."""
        first, dtype = self._layout.structured_dtype(tuple(names))
        return PinnedTensors(self._stream, self._buffer.address + first, dtype)


class PinnedTensors:
    """Page-locked host memory with the layout of some adjacent tensors of a block.

    Attributes:
        arrays: the tensors by name, to write to while no upload is in progress.
    """

    def __init__(self, stream: CudaStream, address: int, dtype: np.dtype[Any]) -> None:
        self._stream, self._address = stream, address
        self._buffer: PinnedBuffer = stream.allocate_pinned(dtype.itemsize)
        record = self._buffer.array.view(dtype)
        self.arrays: dict[str, NDArray[Any]] = {name: record[name][0] for name in dtype.names or ()}

    def upload(self) -> None:
        """Enqueue one copy of all tensors to the device."""
        self._stream.copy(self._address, self._buffer.address, self._buffer.array.nbytes)
