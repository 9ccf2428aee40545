"""The only file that knows cuda-core and cuda-bindings: one device's stream, memory, copies and clock.

Nothing here imports CUDA before a ``CudaStream`` is made. A ``CudaStream`` is used in one thread, that of ``thread.CudaContext``; shared memory may be
read and dropped in any.
"""

from __future__ import annotations

import ctypes
import importlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from scm_runtime.errors import InferenceError, InvalidArgumentError, MissingDependencyError, OutOfMemoryError

P = ParamSpec("P")
Result = TypeVar("Result")

# CUDA's own handles: the stream that all threads share by default, and the one that each thread has by default.
LEGACY_STREAM, PER_THREAD_STREAM = 1, 2
STAGING_BYTES = 64 << 20  # pinned memory is taken from the whole machine: larger results come in pieces


def parse_stream(stream: object) -> int:
    """The handle of a host's stream: an integer, an object with ``__cuda_stream__``, or one of torch's; raises InvalidArgumentError."""
    handle: object = stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        handle = (protocol() if callable(protocol) else protocol)[1]
    elif hasattr(stream, "cuda_stream"):
        handle = stream.cuda_stream
    if isinstance(handle, bool) or not isinstance(handle, int) or handle < 0:
        raise InvalidArgumentError(f"stream must be a CUDA stream's handle or an object with __cuda_stream__, got {stream!r}")
    if handle == PER_THREAD_STREAM:
        raise InvalidArgumentError("stream must be one that other threads can use, got the per-thread default stream (2): make a stream")
    return handle or LEGACY_STREAM


def _import_cuda() -> tuple[Any, Any, Any]:
    try:
        return tuple(importlib.import_module(name) for name in ("cuda.core", "cuda.core.utils", "cuda.bindings.driver"))  # type: ignore[return-value]  # three
    except ImportError as error:
        raise MissingDependencyError(f"cuda-core and cuda-bindings cannot be imported ({error}). Install them:\n  pip install 'scm-runtime[gpu]'") from error


# What CUDA and ONNX Runtime say when the device's context cannot be used any more, whatever is done next.
_FATAL_MESSAGES = (
    *("illegal memory access", "illegal_address", "illegal instruction", "illegal_instruction", "device-side assert", "cuda_error_assert"),
    *("unspecified launch failure", "launch_failed", "misaligned address", "misaligned_address", "uncorrectable ecc", "ecc_uncorrectable"),
)


def is_fatal(error: BaseException) -> bool:
    """Whether an error of CUDA's leaves nothing to go on with in this process."""
    said = str(error).lower()
    return any(words in said for words in _FATAL_MESSAGES)


def _translate_errors(function: Callable[P, Result]) -> Callable[P, Result]:
    """Errors of CUDA's as ours."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except (InferenceError, InvalidArgumentError, MissingDependencyError):
            raise
        except Exception as error:
            if "out_of_memory" in str(error).lower().replace(" ", "_"):
                raise OutOfMemoryError(f"the device's memory does not suffice: {error}") from error
            raise InferenceError(f"CUDA failed: {error}") from error

    return call


class DeviceBuffer:
    """A piece of the device's memory. It is freed when the last reference goes, but not before the device's own thread gets to it."""

    __slots__ = ("_buffer", "_stream", "address", "nbytes", "ready_event")

    def __init__(self, buffer: Any, stream: CudaStream) -> None:
        self._buffer, self._stream = buffer, stream
        self.ready_event: Any = None
        """Of memory that was handed out: the event after which it holds its contents."""
        self.address, self.nbytes = int(buffer.handle), int(buffer.size)

    def __del__(self) -> None:
        self._stream.defer_free(self._buffer, self.ready_event)


class CudaStream:
    """A stream of a device and what is done on it, in order."""

    @_translate_errors
    def __init__(self, index: int, stream: object | None = None) -> None:
        """Take the device, in the calling thread: all methods are for this thread.

        Args:
            index: of the device.
            stream: the host's, see ``parse_stream``; None for one of our own, which does not wait for the default stream nor the other way round.

        Raises:
            InvalidArgumentError: the stream is of another device, or none.
            MissingDependencyError: no cuda-core.
        """
        self._core, self._utils, self._driver = _import_cuda()
        self.index = index
        self._device = self._core.Device(index)
        self._device.set_current()
        self._context = self._check(self._driver.cuCtxGetCurrent())
        self._host_stream_object = stream
        self.owns_stream = stream is None
        self._stream: Any = self._device.create_stream() if stream is None else self._wrap_host_stream(parse_stream(stream))
        self._handle = self._stream.handle
        self.stream_handle = int(self._handle)
        self.can_capture = self.stream_handle not in (0, LEGACY_STREAM)
        self._timed = self._core.EventOptions(timing_enabled=True)
        self._pool: Any = None
        if self._device.properties.memory_pools_supported:
            # A pool of our own goes back to the device as a whole; until then it keeps what calls free for the next one.
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
            return self._core.LEGACY_DEFAULT_STREAM  # every device has one: it is ours while this device is current
        try:
            stream = self._core.Stream.from_handle(handle)
            of = int(stream.device.device_id)
        except Exception as error:
            raise InvalidArgumentError(f"stream must be a CUDA stream, got the handle {handle}, which CUDA does not know: {error}") from error
        if of != self.index:
            raise InvalidArgumentError(f"stream must be one of the device cuda:{self.index}, got one of cuda:{of}. Give device='cuda:{of}', or another stream.")
        return stream

    @_translate_errors
    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Memory of the device, whose contents are not known. Raises OutOfMemoryError."""
        self.free_deferred()
        return DeviceBuffer(self._memory.allocate(max(nbytes, 1), stream=self._stream), self)

    @_translate_errors
    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copy within the device."""
        self._check(self._driver.cuMemcpyAsync(to, source, nbytes, self._handle))

    @_translate_errors
    def upload(self, to: int, array: NDArray[Any]) -> None:
        """Copy a contiguous array of the host's, which must not be changed afterwards."""
        # CUDA says of pageable memory that the call may return before the copy is done, and of some machines that the device reads it itself.
        self._uploading.append(array)
        self._check(self._driver.cuMemcpyAsync(to, array.ctypes.data, array.nbytes, self._handle))

    @_translate_errors
    def download(self, source: int, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """A fresh array of the host's, once all that came before is done."""
        result = np.empty(shape, dtype)
        flat = result.reshape(-1).view(np.uint8)
        staging = self._pinned(min(flat.nbytes, STAGING_BYTES))
        for start in range(0, flat.nbytes, STAGING_BYTES):
            piece = flat[start : start + STAGING_BYTES]
            self._check(self._driver.cuMemcpyAsync(int(staging.handle), source + start, piece.nbytes, self._handle))
            self.synchronize()
            ctypes.memmove(piece.ctypes.data, int(staging.handle), piece.nbytes)
        return result

    def _pinned(self, nbytes: int) -> Any:
        if self._staging is None or self._staging.size < nbytes:
            if self._staging is not None:
                self._staging.close()  # nothing reads it: every use of it waits for its end
                self._staging = None
            size = min(STAGING_BYTES, 1 << max(nbytes - 1, 4095).bit_length())
            self._staging = self._core.LegacyPinnedMemoryResource().allocate(size)
        return self._staging

    @_translate_errors
    def record(self) -> Any:
        """Now, on the stream's clock."""
        return self._stream.record(options=self._timed)

    @_translate_errors
    def elapsed(self, start: Any, end: Any) -> float:
        """Between two records; waits for the second."""
        end.sync()
        return float(end - start) / 1000

    @_translate_errors
    def synchronize(self) -> None:
        """Wait for what was put on the stream, not for what the host puts there from now on, nor for the device."""
        self._stream.record().sync()
        self._uploading.clear()

    @_translate_errors
    def abort_capture(self) -> None:
        """Take the stream out of a capture that failed, where ONNX Runtime left it there."""
        driver = self._driver
        status = self._check(driver.cuStreamIsCapturing(self._handle))
        if status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE:
            status, graph = driver.cuStreamEndCapture(self._handle)
            if not int(status):  # else it is the failure that is known already
                self._check(driver.cuGraphDestroy(graph))

    def defer_free(self, buffer: Any, ready_event: Any) -> None:
        """Free memory, when that can be. From any thread."""
        # Another thread may come while the stream is being captured, and a free would become a part of the graph.
        self._deferred.append((buffer, ready_event))
        if self._closed:
            with self._current_context():
                self.free_deferred()

    @_translate_errors
    def free_deferred(self) -> None:
        """Free the memory that nothing refers to any more."""
        while True:
            try:
                buffer, ready_event = self._deferred.popleft()
            except IndexError:  # also where another thread was faster
                return
            if ready_event is None:
                buffer.close()  # in the order of the stream it was allocated on
                continue
            # It was handed out, and most consumers work on the default stream. Theirs is the last use: the free comes after it there.
            legacy = self._core.LEGACY_DEFAULT_STREAM
            legacy.wait(ready_event)
            buffer.close(legacy)

    @_translate_errors
    def trim(self) -> None:
        """Give what is free back to the device."""
        self.free_deferred()
        self.synchronize()
        if self._pool is not None:
            self._check(self._driver.cuMemPoolTrimTo(self._pool.handle, 0))

    @_translate_errors
    def share(self, memory: DeviceBuffer) -> None:
        """Memory is to be somebody else's, who may read what the stream has been told to write so far."""
        memory.ready_event = self._stream.record()

    @_translate_errors
    def export_dlpack(self, memory: DeviceBuffer, shape: tuple[int, ...], dtype: np.dtype[Any], max_version: tuple[int, int] | None) -> object:
        """A DLPack capsule that keeps the memory. From any thread."""
        with self._current_context():
            buffer = self._core.Buffer.from_handle(memory.address, memory.nbytes, owner=memory)
            return self._utils.StridedMemoryView.from_buffer(buffer, shape, dtype=dtype).__dlpack__(max_version=max_version)

    @_translate_errors
    def stream_wait_event(self, stream: int, event: Any) -> None:
        """Let what comes next on a stream of this device wait for an event. From any thread."""
        with self._current_context():  # which stream the default one is depends on it
            self._check(self._driver.cuStreamWaitEvent(stream, event.handle, 0))

    @_translate_errors
    def close(self) -> None:
        """Give the memory and the stream back. Arrays that were handed out keep theirs."""
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
        """The device made current in a thread of the host's, whose own choice comes back."""
        self._check(self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent()

    def _check(self, returned: tuple[Any, ...]) -> Any:
        """What a call of the driver returned, without its status."""
        status, *values = returned
        if int(status):
            raise InferenceError(f"CUDA failed: {status.name}") if "OUT_OF_MEMORY" not in status.name else OutOfMemoryError(f"CUDA: {status.name}")
        return values[0] if values else None
