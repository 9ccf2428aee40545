"""A CUDA stream with its device's memory, copies, events and captures. No other module imports cuda-core or cuda-bindings.

Nothing here imports CUDA until a ``CudaStream`` is created. A ``CudaStream`` is used in one thread only, that of ``thread.CudaContext``, except for the
methods that say otherwise. Buffers that were shared may be read and dropped in any thread.
"""

from __future__ import annotations

import importlib
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scm_runtime.common.installed import install_extras
from scm_runtime.common.memory import MORE_MEMORY, SMALLER_BATCH, is_out_of_memory
from scm_runtime.engines.cuda.cuda_errors import PinnedMemoryError, check, translate_errors
from scm_runtime.engines.cuda.handles import DeviceBuffer, PinnedBuffer, TimingEvent
from scm_runtime.engines.cuda.stream_argument import LEGACY_STREAM, parse_stream
from scm_runtime.engines.cuda.stream_graphs import StreamGraphs
from scm_runtime.errors import InvalidArgumentError, MissingDependencyError

STAGING_BYTES = 64 << 20  # at most; larger results are copied in chunks, because pinned memory is taken from the whole machine


def _import_cuda() -> tuple[Any, Any, Any]:
    """Return the modules cuda.core, cuda.core.utils and cuda.bindings.driver."""
    try:
        return tuple(importlib.import_module(name) for name in ("cuda.core", "cuda.core.utils", "cuda.bindings.driver"))  # type: ignore[return-value]  # always three
    except ImportError as error:
        raise MissingDependencyError(f"cuda-core and cuda-bindings cannot be imported ({error}). Install them:\n  {install_extras('gpu')}") from error


class CudaStream:
    """A stream of a CUDA device, and the operations that are enqueued on it in order."""

    @translate_errors
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
        self._context = check(self._driver.cuCtxGetCurrent())
        self._host_stream_object = stream  # kept alive
        self.owns_stream = stream is None
        self._stream: Any = self._device.create_stream() if stream is None else self._wrap_host_stream(parse_stream(stream))
        self._handle = self._stream.handle
        self.stream_handle = int(self._handle)
        self.can_capture = self.stream_handle not in (0, LEGACY_STREAM)
        self.graphs = StreamGraphs(self._driver, self._handle)
        self._pool: Any = None
        if self._device.properties.memory_pools_supported:
            # A private pool keeps freed memory for the next call, and returns all of it to the device when it is closed.
            self._pool = self._core.DeviceMemoryResource(self._device, self._core.DeviceMemoryResourceOptions())
            threshold = self._driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
            check(self._driver.cuMemPoolSetAttribute(self._pool.handle, threshold, self._driver.cuuint64_t(2**64 - 1)))
        self._memory: Any = self._pool or self._device.memory_resource
        self._deferred: deque[tuple[Any, TimingEvent | None]] = deque()
        self._free_events: deque[Any] = deque()
        self._done = self.new_event()  # of ``synchronize``
        self._uploading: list[NDArray[Any]] = []
        self._staging: PinnedBuffer | None = None
        self._closed = False
        self._is_finalizing = sys.is_finalizing  # the modules' globals may be gone by then

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

    # -- Memory and copies -----------------------------------------------------------------------------------------------------------------------------------

    @translate_errors
    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Allocate uninitialized device memory. Raises OutOfMemoryError."""
        self.free_deferred()
        return DeviceBuffer(self._memory.allocate(max(nbytes, 1), stream=self._stream), self)

    @translate_errors
    def allocate_pinned(self, nbytes: int) -> PinnedBuffer:
        """Allocate page-locked host memory. Raises PinnedMemoryError."""
        try:
            buffer = self._core.LegacyPinnedMemoryResource().allocate(nbytes)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise PinnedMemoryError(
                f"the host has no more page-locked memory: {nbytes} bytes were requested. {SMALLER_BATCH}. {MORE_MEMORY}. ({error})"
            ) from error
        return PinnedBuffer(buffer, nbytes, self)

    @translate_errors
    def clear(self, destination: int, nbytes: int) -> None:
        """Enqueue a fill of device memory with zeros."""
        check(self._driver.cuMemsetD8Async(destination, 0, nbytes, self._handle))

    @translate_errors
    def copy(self, destination: int, source: int, nbytes: int) -> None:
        """Enqueue a copy of ``nbytes`` bytes between two addresses of the device, or of page-locked host memory."""
        check(self._driver.cuMemcpyAsync(destination, source, nbytes, self._handle))

    @translate_errors
    def upload(self, destination: int, array: NDArray[Any]) -> None:
        """Enqueue a copy of a contiguous host array to a device address. The array must not be changed afterwards."""
        # From pageable memory, the call may return before the copy is done; on some machines the device reads pageable memory directly.
        self._uploading.append(array)
        check(self._driver.cuMemcpyAsync(destination, array.ctypes.data, array.nbytes, self._handle))

    def download(self, source: int, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """Copy device memory to a new host array. Waits until the work enqueued before is done."""
        result = np.empty(shape, dtype)
        self._download(source, result.reshape(-1).view(np.uint8))
        return result

    def read(self, source: int, nbytes: int, copied: TimingEvent) -> NDArray[np.uint8]:
        """Copy device memory to the host, and record the event ``copied``. Waits until the work enqueued before is done.

        The result is valid until the next copy to the host: up to STAGING_BYTES it is the page-locked memory itself.
        """
        if nbytes > STAGING_BYTES:
            result = np.empty(nbytes, np.uint8)
            self._download(source, result, copied)
            return result
        staging = self._pinned(nbytes)
        self.copy(staging.address, source, nbytes)
        self.synchronize(copied)
        return staging.array[:nbytes]

    def _download(self, source: int, result: NDArray[np.uint8], copied: TimingEvent | None = None) -> None:
        staging = self._pinned(min(result.nbytes, STAGING_BYTES))
        for start in range(0, result.nbytes, STAGING_BYTES):
            chunk = result[start : start + STAGING_BYTES]
            self.copy(staging.address, source + start, chunk.nbytes)
            self.synchronize(copied)
            chunk[:] = staging.array[: chunk.nbytes]

    def _pinned(self, nbytes: int) -> PinnedBuffer:
        """Return a pinned host buffer of at least ``nbytes`` bytes, which the next call may reuse."""
        if self._staging is None or self._staging.array.nbytes < nbytes:
            self._staging = None  # safe: every copy into it is waited for, and the buffer is freed once it is not read any more
            self._staging = self.allocate_pinned(min(STAGING_BYTES, 1 << max(nbytes - 1, 4095).bit_length()))
        return self._staging

    def defer_free(self, buffer: Any, ready_event: TimingEvent | None) -> None:
        """Free a cuda-core buffer as soon as that is safe. May be called from any thread."""
        # The caller may be another thread during a capture, and the free would be captured as a part of the graph.
        self._deferred.append((buffer, ready_event))
        # At the end of the process, cuda-core can import nothing any more, and the memory is freed with the process.
        if self._closed and not self._is_finalizing():
            with self._current_context():
                self.free_deferred()

    @translate_errors
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
            self.stream_wait_event(LEGACY_STREAM, ready_event)
            buffer.close(self._core.LEGACY_DEFAULT_STREAM)

    @translate_errors
    def trim(self) -> None:
        """Wait for the work enqueued so far, and return the free memory of the pool to the device."""
        self.synchronize()  # page-locked memory is freed at once, and uploads may still read it
        self.free_deferred()
        self.synchronize()
        if self._pool is not None:
            check(self._driver.cuMemPoolTrimTo(self._pool.handle, 0))

    # -- Events ----------------------------------------------------------------------------------------------------------------------------------------------

    @translate_errors
    def new_event(self) -> TimingEvent:
        """Return an event that is not recorded yet."""
        try:
            handle = self._free_events.popleft()
        except IndexError:
            handle = check(self._driver.cuEventCreate(0))
        return TimingEvent(handle, self._free_events)

    @translate_errors
    def record(self, event: TimingEvent | None = None, *, in_capture: bool = False) -> TimingEvent:
        """Enqueue an event, by default a new one, and return it. In a capture it becomes a part of the graph, and each launch records it."""
        event = event or self.new_event()
        if in_capture:
            flag = int(self._driver.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL)
            check(self._driver.cuEventRecordWithFlags(event.handle, self._handle, flag))
        else:
            check(self._driver.cuEventRecord(event.handle, self._handle))
        return event

    @translate_errors
    def elapsed(self, start: TimingEvent, end: TimingEvent) -> float:
        """Return the seconds between two recorded events. Waits for ``end``."""
        returned = self._driver.cuEventElapsedTime(start.handle, end.handle)
        if returned[0] and returned[0].name == "CUDA_ERROR_NOT_READY":
            self.wait_for(end)
            returned = self._driver.cuEventElapsedTime(start.handle, end.handle)
        return float(check(returned)) / 1000

    @translate_errors
    def wait_for(self, event: TimingEvent) -> None:
        """Wait until the work before an event is done."""
        check(self._driver.cuEventSynchronize(event.handle))

    @translate_errors
    def synchronize(self, done: TimingEvent | None = None) -> None:
        """Wait for the work enqueued so far, and record an event after it. Does not wait for other streams, nor for work that the caller enqueues meanwhile."""
        self.wait_for(self.record(done or self._done))
        self._uploading.clear()

    # -- Sharing ---------------------------------------------------------------------------------------------------------------------------------------------

    @translate_errors
    def share(self, buffer: DeviceBuffer) -> None:
        """Prepare a buffer for consumers on other streams: record the event after which its contents are complete."""
        buffer.ready_event = self.record()

    @translate_errors
    def export_dlpack(self, buffer: DeviceBuffer, shape: tuple[int, ...], dtype: np.dtype[Any], max_version: tuple[int, int] | None) -> object:
        """Return a DLPack capsule that keeps the buffer alive. May be called from any thread."""
        with self._current_context():
            view = self._core.Buffer.from_handle(buffer.address, buffer.nbytes, owner=buffer)
            return self._utils.StridedMemoryView.from_buffer(view, shape, dtype=dtype).__dlpack__(max_version=max_version)

    @translate_errors
    def stream_wait_event(self, stream: int, event: TimingEvent) -> None:
        """Make later work on a stream of this device, given by its handle, wait for an event. May be called from any thread."""
        with self._current_context():  # the handles of the default streams refer to the current context
            check(self._driver.cuStreamWaitEvent(stream, event.handle, 0))

    @translate_errors
    def close(self) -> None:
        """Free the memory, and the stream unless the caller owns it. Shared buffers stay valid."""
        self.synchronize()
        self._staging = None
        self.free_deferred()
        del self._done
        while self._free_events:  # events that other threads drop meanwhile are appended
            check(self._driver.cuEventDestroy(self._free_events.popleft()))
        self._closed = True
        if self._pool is not None:
            self._pool.close()
        if self.owns_stream:
            self._stream.close()

    @contextmanager
    def _current_context(self) -> Iterator[None]:
        """Make the device's context current in the calling thread, and restore the previous one afterwards."""
        check(self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent()
