"""The one thread in which all of a Generator's CUDA work is done: ONNX Runtime keeps captured graphs a thread, and work on a stream wants an order."""

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


_JOBS = RunRegistry()  # the process does not end within one: they may be in ONNX Runtime or CUDA


class _Job:
    """Something to be done, and what came of it."""

    def __init__(self, what: Callable[[], Any], run: Run) -> None:
        self.what: Callable[[], Any] | None = what
        self.run = run
        """In flight from when it is queued to its end."""
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()


class _Worker:
    """What the thread knows. It does not know the context, so that a context that was dropped without close is collected, and the thread ends."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.fatal_error: str | None = None

    def work(self) -> None:
        while (job := self.jobs.get()) is not None:
            try:
                with CAPTURE_LOCK.shared():
                    assert job.what is not None
                    job.result = job.what()
            except BaseException as error:  # noqa: BLE001 - the caller gets it
                job.error = self._classify(error)
            job.what = None  # may hold much, and this frame lives until the next job
            job.run.end()
            job.done.release()
            del job

    def _classify(self, error: BaseException) -> BaseException:
        if not isinstance(error, InferenceError) or not is_fatal(error):
            return error
        self.fatal_error = f"CUDA failed in a way that the process cannot recover from: {error} Restart the process."
        lost = InferenceError(self.fatal_error)
        lost.__cause__ = error
        return lost


class CudaContext:
    """A device, a stream of it, and the thread that works there. Engines share it, and the last one that closes ends it."""

    def __init__(self, index: int, stream: object | None = None, *, open_stream: Callable[[int, object | None], CudaStream] = CudaStream) -> None:
        """Take a device.

        Args:
            index: of the device.
            stream: the host's, see ``stream.parse_stream``; None for one of our own.
            open_stream: for tests.

        Raises:
            InvalidArgumentError: the stream is of another device, or none.
            MissingDependencyError: no cuda-core.
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

    def run(self, what: Callable[[], Result]) -> Result:
        """Do it in the thread and return what it returns, or raise what it raises; within the thread, at once.

        A caller that is interrupted while it waits leaves the job to end by itself.

        Raises:
            GeneratorClosedError: the context is closed.
            InferenceError: CUDA was lost before.
        """
        if threading.current_thread() is self._thread:
            return what()
        job = _Job(what, _JOBS.run(thread=self._thread.ident))
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
                job.error = None  # or the error would hold this frame, which holds the error
        result: Result = job.result
        return result

    @property
    def context_lost(self) -> bool:
        """Whether CUDA failed in a way that the process cannot recover from."""
        return self._worker.fatal_error is not None

    def retain(self) -> None:
        """One more engine works here."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """One engine less; after the last one, end the thread, when what it has to do is done, and give the stream and the memory back."""
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
