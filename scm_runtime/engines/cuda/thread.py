"""The thread that does all CUDA work of a Generator.

One thread, because ONNX Runtime keeps captured CUDA graphs per thread, and because work on a stream must be enqueued in order.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from scm_runtime.common.runs import Run, RunRegistry
from scm_runtime.engines.cuda.capture_lock import CAPTURE_LOCK
from scm_runtime.engines.cuda.stream import CudaStream, is_fatal
from scm_runtime.errors import DeviceError, GeneratorClosedError, InferenceError

Result = TypeVar("Result")

_JOBS = RunRegistry()  # the end of the process waits for jobs, which may be inside ONNX Runtime or CUDA


class _Job:
    """A function to be called in the thread, and its result or error."""

    def __init__(self, function: Callable[[], Any], run: Run) -> None:
        self.function: Callable[[], Any] | None = function
        self.run = run
        """In flight from when the job is queued until it ends."""
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()


class _Worker:
    """The queue and state of the thread. It has no reference to the context: a context dropped without ``close`` is collected, which ends the thread."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.fatal_error: str | None = None
        """The error after which CUDA cannot be used in this process any more."""

    def work(self) -> None:
        while (job := self.jobs.get()) is not None:
            try:
                with CAPTURE_LOCK.shared():
                    assert job.function is not None
                    job.result = job.function()
            except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
                job.error = self._classify(error)
            job.function = None  # it may hold large objects, and this frame keeps the job until the next one
            job.run.end()
            job.done.release()
            del job

    def _classify(self, error: BaseException) -> BaseException:
        """Return the error to raise in the caller's thread, and remember it if CUDA cannot recover from it."""
        if not isinstance(error, InferenceError) or not is_fatal(error):
            return error
        self.fatal_error = f"CUDA failed in a way that the process cannot recover from: {error} Restart the process."
        fatal = InferenceError(self.fatal_error)
        fatal.__cause__ = error
        return fatal


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
        self._worker = _Worker()
        self._users = 0
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._worker.work, name=f"scm-runtime cuda:{index}", daemon=True)
        self._thread.start()
        try:
            self.stream: CudaStream = self.run(lambda: open_stream(index, stream))
        except BaseException as error:
            self._worker.jobs.put(None)
            if isinstance(error, InferenceError):
                raise DeviceError(f"cuda:{index} cannot be used: {error}. scm-runtime doctor shows what is missing.") from error
            raise
        self.stream_handle = self.stream.stream_handle

    def __del__(self) -> None:
        self._worker.jobs.put(None)

    def run(self, function: Callable[[], Result]) -> Result:
        """Call a function in the context's thread, and return its result or raise its error. In that thread, call it directly.

        If the caller is interrupted while it waits, the function still runs to its end.

        Raises:
            GeneratorClosedError: the context is closed.
            InferenceError: CUDA failed before in a way that the process cannot recover from.
        """
        if threading.current_thread() is self._thread:
            return function()
        job = _Job(function, _JOBS.run(thread=self._thread.ident))
        with self._lock:
            if self._closed:
                raise GeneratorClosedError("this Generator is closed: make a new one")
            if self._worker.fatal_error is not None:
                raise InferenceError(self._worker.fatal_error)
            job.run.begin()
            self._worker.jobs.put(job)
        with CAPTURE_LOCK.released():
            job.done.acquire()
        if job.error is not None:
            try:
                raise job.error
            finally:
                job.error = None  # breaks a reference cycle: the error holds this frame, which holds the job
        result: Result = job.result
        return result

    @property
    def context_lost(self) -> bool:
        """True after CUDA failed in a way that the process cannot recover from."""
        return self._worker.fatal_error is not None

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
            self._worker.jobs.put(None)
            if threading.current_thread() is not self._thread:
                self._thread.join()
