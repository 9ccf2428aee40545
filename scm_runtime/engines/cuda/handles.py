"""Objects of CUDA that may be dropped in any thread: the stream's own thread frees them or uses them again."""

from __future__ import annotations

import ctypes
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scm_runtime.engines.cuda.stream import CudaStream


class DeviceBuffer:
    """A piece of device memory. Once the last reference is dropped, the thread of the CudaStream frees it."""

    __slots__ = ("_buffer", "_stream", "address", "nbytes", "ready_event")

    def __init__(self, buffer: Any, stream: CudaStream) -> None:
        self._buffer, self._stream = buffer, stream
        self.ready_event: TimingEvent | None = None
        """The event after which a shared buffer holds its contents; None if the buffer is not shared."""
        self.address, self.nbytes = int(buffer.handle), int(buffer.size)

    def __del__(self) -> None:
        self._stream.defer_free(self._buffer, self.ready_event)


class PinnedBuffer:
    """Page-locked host memory. Once the last reference is dropped, the thread of the CudaStream frees it: every copy from or to it must be done by then."""

    __slots__ = ("_buffer", "_stream", "address", "array")

    def __init__(self, buffer: Any, nbytes: int, stream: CudaStream) -> None:
        self._buffer, self._stream, self.address = buffer, stream, int(buffer.handle)
        self.array: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))
        """The bytes, which are valid as long as this object exists."""

    def __del__(self) -> None:
        self._stream.defer_free(self._buffer, None)


class TimingEvent:
    """An event that records a time. Once the last reference is dropped, the CudaStream uses it again."""

    __slots__ = ("_free", "handle")

    def __init__(self, handle: Any, free: deque[Any]) -> None:
        self.handle, self._free = handle, free

    def __del__(self) -> None:
        self._free.append(self.handle)
