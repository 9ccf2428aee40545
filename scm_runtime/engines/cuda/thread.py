"""The thread that does all CUDA work of a Generator.

One thread, because ONNX Runtime keeps handles of CUDA's libraries per thread, and because work on a stream must be enqueued in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

from scm_runtime.common.job_thread import JobThread
from scm_runtime.common.runs import interrupted_error
from scm_runtime.engines.cuda.capture_lock import CAPTURE_LOCK
from scm_runtime.engines.cuda.cuda_errors import is_fatal
from scm_runtime.engines.cuda.stream import CudaStream
from scm_runtime.errors import DeviceError, GeneratorClosedError, InferenceError

Result = TypeVar("Result")


class _Health:
    """Whether CUDA can still be used. An object of its own, so that the thread has no reference to the context."""

    def __init__(self) -> None:
        self.fatal_error: str | None = None
        """The error after which CUDA cannot be used in this process any more."""

    def watch(self, function: Callable[[], Result]) -> Result:
        """Call a function that uses CUDA, and remember an error from which CUDA cannot recover."""
        try:
            with CAPTURE_LOCK.shared():
                return function()
        except InferenceError as error:
            if not is_fatal(error):
                raise
            self.fatal_error = f"CUDA failed in a way that the process cannot recover from: {error} Restart the process."
            raise InferenceError(self.fatal_error) from error


class CudaContext:
    """A CUDA device, a stream and the thread that uses them. Engines share a context; closing the last engine closes it."""

    def __init__(self, index: int, stream: object | None = None, *, open_stream: Callable[[int, object | None], CudaStream] = CudaStream) -> None:
        """Start the thread and make the device current in it.

        Args:
            index: index of the device.
            stream: a stream owned by the caller, see ``stream.parse_stream``; None creates one.
            open_stream: creates the stream; tests replace it.

        Raises:
            InvalidArgumentError: ``stream`` is not a CUDA stream, or belongs to another device.
            MissingDependencyError: cuda-core is not installed.
            DeviceError: CUDA cannot be used.
        """
        self.index = index
        self._health = _Health()
        self._users = 0
        self._lock = threading.Lock()
        self._closed = False
        self._jobs = JobThread(f"scm-runtime cuda:{index}")
        try:
            self.stream: CudaStream = self.run(lambda: open_stream(index, stream))
        except BaseException as error:
            self._jobs.close()
            if isinstance(error, InferenceError):
                raise DeviceError(f"cuda:{index} cannot be used: {error}. scm-runtime doctor shows what is missing.") from error
            raise
        self.stream_handle = self.stream.stream_handle

    def run(self, function: Callable[[], Result]) -> Result:
        """Call a function in the context's thread, and return its result or raise its error. In that thread, call it directly.

        The function runs in the caller's CancelScope; if that is cancelled before the function's turn comes, the scope's error is raised at once. If the
        caller is interrupted while it waits, the scope is cancelled, and the function runs to its early end without the caller.

        Raises:
            GeneratorClosedError: the context is closed.
            InferenceError: CUDA failed before in a way that the process cannot recover from.
        """
        if self._jobs.is_current:
            return function()
        health = self._health
        job = self._jobs.job(lambda: health.watch(function))
        with self._lock:
            if self._closed:
                raise GeneratorClosedError("this Generator is closed: make a new one")
            if health.fatal_error is not None:
                raise InferenceError(health.fatal_error)
            self._jobs.put(job)
        try:
            with CAPTURE_LOCK.released() if CAPTURE_LOCK.held else nullcontext():
                job.wait()
        except BaseException:  # raised by a signal handler: Ctrl-C, for example
            if job.scope is not None:
                job.scope.cancel(interrupted_error)
            raise
        result: Result = job.result()
        return result

    @property
    def is_current(self) -> bool:
        """True in the context's thread."""
        return self._jobs.is_current

    @property
    def context_lost(self) -> bool:
        """True after CUDA failed in a way that the process cannot recover from."""
        return self._health.fatal_error is not None

    def retain(self) -> None:
        """Register an engine that uses the context."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """Unregister an engine. After the last one, finish the queued jobs, close the stream and end the thread."""
        with self._lock:
            self._users -= 1
            if self._users or self._closed:
                return
        try:
            if not self.context_lost:
                self.run(self.stream.close)
        finally:
            with self._lock:
                self._closed = True
            self._jobs.close()
