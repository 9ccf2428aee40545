"""A CUDA stream with its device's memory, copies and events. No other module imports cuda-core or cuda-bindings.

Nothing here imports CUDA until a ``CudaStream`` is created. A ``CudaStream`` is used in one thread only, that of ``thread.CudaContext``, except for the
methods that say otherwise. Buffers that were shared may be read and dropped in any thread.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from scm_runtime.common.installed import install_extras
from scm_runtime.errors import InferenceError, InvalidArgumentError, MissingDependencyError, OutOfMemoryError

P = ParamSpec("P")
Result = TypeVar("Result")

# CUDA's predefined handles: the default stream shared by all threads, and the default stream of the calling thread.
LEGACY_STREAM, PER_THREAD_STREAM = 1, 2
STAGING_BYTES = 64 << 20  # at most; larger results are copied in chunks, because pinned memory is taken from the whole machine


def parse_stream(stream: object) -> int:
    """Return the handle of a stream given by the caller.

    Args:
        stream: an integer handle, an object with ``__cuda_stream__``, or a ``torch.cuda.Stream``; 0 is the legacy default stream.

    Raises:
        InvalidArgumentError: it is none of these, or it is the per-thread default stream.
    """
    handle: object = stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        handle = (protocol() if callable(protocol) else protocol)[1]
    elif hasattr(stream, "cuda_stream"):
        handle = stream.cuda_stream
    if isinstance(handle, bool) or not isinstance(handle, int) or handle < 0:
        raise InvalidArgumentError(f"stream must be the handle of a CUDA stream or an object with __cuda_stream__, got {stream!r}")
    if handle == PER_THREAD_STREAM:
        raise InvalidArgumentError("stream must be usable from other threads, got the per-thread default stream (2): create a stream")
    return handle or LEGACY_STREAM


def _import_cuda() -> tuple[Any, Any, Any]:
    """Return the modules cuda.core, cuda.core.utils and cuda.bindings.driver."""
    try:
        return tuple(importlib.import_module(name) for name in ("cuda.core", "cuda.core.utils", "cuda.bindings.driver"))  # type: ignore[return-value]  # always three
    except ImportError as error:
        raise MissingDependencyError(f"cuda-core and cuda-bindings cannot be imported ({error}). Install them:\n  {install_extras('gpu')}") from error


# Parts of the messages of CUDA and ONNX Runtime, in lower case, after which the device's context is unusable until the process restarts.
_FATAL_MESSAGES = (
    *("illegal memory access", "illegal_address", "illegal instruction", "illegal_instruction", "device-side assert", "cuda_error_assert"),
    *("unspecified launch failure", "launch_failed", "misaligned address", "misaligned_address", "uncorrectable ecc", "ecc_uncorrectable"),
)


def is_fatal(error: BaseException) -> bool:
    """Return True if a CUDA error makes the device's context unusable in this process."""
    message = str(error).lower()
    return any(words in message for words in _FATAL_MESSAGES)


def _translate_errors(function: Callable[P, Result]) -> Callable[P, Result]:
    """Decorate a function so that CUDA's exceptions become InferenceError or OutOfMemoryError."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except (InferenceError, InvalidArgumentError, MissingDependencyError, MemoryError):  # MemoryError: of the host
            raise
        except Exception as error:
            if "out_of_memory" in str(error).lower().replace(" ", "_"):
                raise OutOfMemoryError(f"the device is out of memory: {error}") from error
            raise InferenceError(f"CUDA failed: {error}") from error

    return call


class DeviceBuffer:
    """A piece of device memory. Once the last reference is dropped, the thread of the CudaContext frees it."""

    __slots__ = ("_buffer", "_stream", "address", "nbytes", "ready_event")

    def __init__(self, buffer: Any, stream: CudaStream) -> None:
        self._buffer, self._stream = buffer, stream
        self.ready_event: Any = None
        """The event after which a shared buffer holds its contents; None if the buffer is not shared."""
        self.address, self.nbytes = int(buffer.handle), int(buffer.size)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():  # cuda-core can import nothing any more, and the memory is freed with the process
            self._stream.defer_free(self._buffer, self.ready_event)


class CudaStream:
    """A stream of a CUDA device, and the operations that are enqueued on it in order."""

    @_translate_errors
    def __init__(self, index: int, stream: object | None = None) -> None:
        """Make the device current in the calling thread, which is the only one that may call the methods.

        Args:
            index: index of the device.
            stream: a stream owned by the caller, see ``parse_stream``. None creates a non-blocking stream, which is not synchronized with the default stream.

        Raises:
            InvalidArgumentError: ``stream`` is not a CUDA stream, or belongs to another device.
            MissingDependencyError: cuda-core is not installed.
            InferenceError: CUDA failed.
        """
        self._core, self._utils, self._driver = _import_cuda()
        self.index = index
        self._device = self._core.Device(index)
        self._device.set_current()
        self._context = self._check(self._driver.cuCtxGetCurrent())
        self._host_stream_object = stream  # kept alive
        self.owns_stream = stream is None
        self._stream: Any = self._device.create_stream() if stream is None else self._wrap_host_stream(parse_stream(stream))
        self._handle = self._stream.handle
        self.stream_handle = int(self._handle)
        self.can_capture = self.stream_handle not in (0, LEGACY_STREAM)
        self._timed = self._core.EventOptions(timing_enabled=True)
        self._pool: Any = None
        if self._device.properties.memory_pools_supported:
            # A private pool keeps freed memory for the next call, and returns all of it to the device when it is closed.
            self._pool = self._core.DeviceMemoryResource(self._device, self._core.DeviceMemoryResourceOptions())
            threshold = self._driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
            self._check(self._driver.cuMemPoolSetAttribute(self._pool.handle, threshold, self._driver.cuuint64_t(2**64 - 1)))
        self._memory: Any = self._pool or self._device.memory_resource
        self._deferred: deque[tuple[Any, Any]] = deque()
        self._uploading: list[NDArray[Any]] = []
        self._staging: Any = None
        self._closed = False

    def _wrap_host_stream(self, handle: int) -> Any:
        if handle == LEGACY_STREAM:
            return self._core.LEGACY_DEFAULT_STREAM  # every device has one: it is this device's while the device is current
        try:
            stream = self._core.Stream.from_handle(handle)
            device_index = int(stream.device.device_id)
        except Exception as error:
            raise InvalidArgumentError(f"stream must be a CUDA stream, got the unknown handle {handle}: {error}") from error
        if device_index != self.index:
            raise InvalidArgumentError(
                f"stream must belong to the device cuda:{self.index}, got a stream of cuda:{device_index}. "
                f"Pass device='cuda:{device_index}', or a stream of cuda:{self.index}."
            )
        return stream

    @_translate_errors
    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Allocate uninitialized device memory. Raises OutOfMemoryError."""
        self.free_deferred()
        return DeviceBuffer(self._memory.allocate(max(nbytes, 1), stream=self._stream), self)

    @_translate_errors
    def copy(self, destination: int, source: int, nbytes: int) -> None:
        """Enqueue a copy of ``nbytes`` bytes between two device addresses."""
        self._check(self._driver.cuMemcpyAsync(destination, source, nbytes, self._handle))

    @_translate_errors
    def upload(self, destination: int, array: NDArray[Any]) -> None:
        """Enqueue a copy of a contiguous host array to a device address. The array must not be changed afterwards."""
        # From pageable memory, the call may return before the copy is done; on some machines the device reads pageable memory directly.
        self._uploading.append(array)
        self._check(self._driver.cuMemcpyAsync(destination, array.ctypes.data, array.nbytes, self._handle))

    @_translate_errors
    def download(self, source: int, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """Copy device memory to a new host array. Waits until the work enqueued before is done."""
        result = np.empty(shape, dtype)
        flat = result.reshape(-1).view(np.uint8)
        staging = self._pinned(min(flat.nbytes, STAGING_BYTES))
        for start in range(0, flat.nbytes, STAGING_BYTES):
            chunk = flat[start : start + STAGING_BYTES]
            self._check(self._driver.cuMemcpyAsync(int(staging.handle), source + start, chunk.nbytes, self._handle))
            self.synchronize()
            ctypes.memmove(chunk.ctypes.data, int(staging.handle), chunk.nbytes)
        return result

    def _pinned(self, nbytes: int) -> Any:
        """Return a pinned host buffer of at least ``nbytes`` bytes, which the next call may reuse."""
        if self._staging is None or self._staging.size < nbytes:
            if self._staging is not None:
                self._staging.close()  # safe: every copy into it is waited for
                self._staging = None
            size = min(STAGING_BYTES, 1 << max(nbytes - 1, 4095).bit_length())
            self._staging = self._core.LegacyPinnedMemoryResource().allocate(size)
        return self._staging

    @_translate_errors
    def record(self) -> Any:
        """Enqueue a timing event and return it."""
        return self._stream.record(options=self._timed)

    @_translate_errors
    def elapsed(self, start: Any, end: Any) -> float:
        """Return the seconds between two events made by ``record``. Waits for ``end``."""
        end.sync()
        return float(end - start) / 1000

    @_translate_errors
    def wait_for(self, event: Any) -> None:
        """Wait until the work before an event is done."""
        event.sync()

    @_translate_errors
    def synchronize(self) -> None:
        """Wait for the work enqueued so far. Does not wait for other streams, nor for work that the caller enqueues meanwhile."""
        self._stream.record().sync()
        self._uploading.clear()

    @_translate_errors
    def abort_capture(self) -> None:
        """End a failed capture if ONNX Runtime left the stream in capture mode."""
        driver = self._driver
        status = self._check(driver.cuStreamIsCapturing(self._handle))
        if status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE:
            status, graph = driver.cuStreamEndCapture(self._handle)
            if not int(status):  # otherwise it reports the failure that the caller knows about
                self._check(driver.cuGraphDestroy(graph))

    def defer_free(self, buffer: Any, ready_event: Any) -> None:
        """Free a cuda-core buffer as soon as that is safe. May be called from any thread."""
        # The caller may be another thread during a capture, and the free would be captured as a part of the graph.
        self._deferred.append((buffer, ready_event))
        if self._closed:
            with self._current_context():
                self.free_deferred()

    @_translate_errors
    def free_deferred(self) -> None:
        """Free the buffers that were passed to ``defer_free``."""
        while True:
            try:
                buffer, ready_event = self._deferred.popleft()
            except IndexError:  # also if another thread took the last one
                return
            if ready_event is None:
                buffer.close()  # in the order of the stream that it was allocated on
                continue
            # The buffer was shared, and most consumers use it on the default stream. Freeing it there orders the free after their last use.
            legacy = self._core.LEGACY_DEFAULT_STREAM
            legacy.wait(ready_event)
            buffer.close(legacy)

    @_translate_errors
    def trim(self) -> None:
        """Return the free memory of the pool to the device."""
        self.free_deferred()
        self.synchronize()
        if self._pool is not None:
            self._check(self._driver.cuMemPoolTrimTo(self._pool.handle, 0))

    @_translate_errors
    def share(self, buffer: DeviceBuffer) -> None:
        """Prepare a buffer for consumers on other streams: record the event after which its contents are complete."""
        buffer.ready_event = self._stream.record()

    @_translate_errors
    def export_dlpack(self, buffer: DeviceBuffer, shape: tuple[int, ...], dtype: np.dtype[Any], max_version: tuple[int, int] | None) -> object:
        """Return a DLPack capsule that keeps the buffer alive. May be called from any thread."""
        with self._current_context():
            view = self._core.Buffer.from_handle(buffer.address, buffer.nbytes, owner=buffer)
            return self._utils.StridedMemoryView.from_buffer(view, shape, dtype=dtype).__dlpack__(max_version=max_version)

    @_translate_errors
    def stream_wait_event(self, stream: int, event: Any) -> None:
        """Make later work on a stream of this device, given by its handle, wait for an event. May be called from any thread."""
        with self._current_context():  # the handles of the default streams refer to the current context
            self._check(self._driver.cuStreamWaitEvent(stream, event.handle, 0))

    @_translate_errors
    def close(self) -> None:
        """Free the memory, and the stream unless the caller owns it. Shared buffers stay valid."""
        self.synchronize()
        self.free_deferred()
        if self._staging is not None:
            self._staging.close()
        self._closed = True
        if self._pool is not None:
            self._pool.close()
        if self.owns_stream:
            self._stream.close()

    @contextmanager
    def _current_context(self) -> Iterator[None]:
        """Make the device's context current in the calling thread, and restore the previous one afterwards."""
        self._check(self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent()

    def _check(self, returned: tuple[Any, ...]) -> Any:
        """Return the result of a driver call without its status. Raises InferenceError or OutOfMemoryError if the call failed."""
        status, *values = returned
        if int(status):
            if "OUT_OF_MEMORY" in status.name:
                raise OutOfMemoryError(f"the device is out of memory: {status.name}")
            raise InferenceError(f"CUDA failed: {status.name}")
        return values[0] if values else None
