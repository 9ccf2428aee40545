"""A thread that runs functions for other threads, one after another. Whoever waits for one is open to signals, and to the cancellation of its CancelScope."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from scm_runtime.common.runs import Run, RunRegistry
from scm_runtime.errors import InferenceError

if TYPE_CHECKING:
    from queue import SimpleQueue

_REGISTRY = RunRegistry()  # the end of the process waits for jobs, which may be inside ONNX Runtime or CUDA


class Job(Run):
    """A function to be called in a JobThread, and its result or error. It is a run in flight from when it is queued until it ends."""

    __slots__ = ("_claims", "_error", "_function", "_result")

    def __init__(self, function: Callable[[], Any], thread: int | None) -> None:
        super().__init__(_REGISTRY, None, thread)
        self._function: Callable[[], Any] | None = function
        self._result: Any = None
        self._error: BaseException | None = None
        self._claims: list[tuple[str, int]] = []  # purpose and thread; the first one decides. Neither threads nor signal handlers interrupt an append.

    def call(self) -> None:
        """Call the function, in the thread. The runs in it belong to the scope in which the job was queued."""
        if not self._claim("call"):
            return
        try:
            assert self._function is not None
            self._result = self._function() if self.scope is None else self.scope.call(self._function)
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            self._error = error
        self._function = None  # it may hold large objects, and the thread's frame keeps the job until the next one
        self.end()

    def terminate(self) -> None:
        """Withdraw the job if its scope is cancelled and the function was not called yet. Runs that the function began are terminated by themselves."""
        if self.scope is not None and self.scope.cancelled and self.withdraw():
            self._error = self.scope.error()
            self._function = None
            self.end()

    def withdraw(self) -> bool:
        """Return True if this thread is the first to withdraw the job, and the function was not called yet: it is not called any more then."""
        return self._claim("withdraw")

    def _claim(self, purpose: str) -> bool:
        claim = purpose, threading.get_ident()
        self._claims.append(claim)
        return self._claims[0] == claim  # also if a signal handler raised here before, and the thread calls this again

    def result(self) -> Any:
        """Return the result of an ended job, or raise its error."""
        if self._error is None:
            result, self._result = self._result, None  # the thread may still refer to the job
            return result
        try:
            raise self._error
        finally:
            self._error = None  # breaks a reference cycle: the error holds this frame, which holds the job


class JobThread:
    """The thread and its queue. A JobThread that is dropped without ``close`` is collected, which ends the thread."""

    def __init__(self, name: str, *, idle_s: float | None = None, may_end: Callable[[], bool] = lambda: False) -> None:
        """Start the thread.

        Args:
            name: of the thread.
            idle_s: seconds without a job after which the thread calls ``may_end``.
            may_end: returns True if nobody will queue another job; the thread ends then.

        Raises:
            InferenceError: the system has no more threads.
        """
        from queue import SimpleQueue

        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self.thread = threading.Thread(target=_work, args=(self._queue, idle_s, may_end), name=name, daemon=True)
        try:
            self.thread.start()
        except RuntimeError as error:
            raise InferenceError(f"cannot start the thread {name!r}: {error}. Raise the limit of threads.") from error

    def __del__(self) -> None:
        self._queue.put(None)

    @property
    def is_current(self) -> bool:
        """True in this thread."""
        return threading.current_thread() is self.thread  # another thread may get the identifier of one that has ended

    def job(self, function: Callable[[], Any]) -> Job:
        """Return a job for this thread, in the active CancelScope. ``put`` queues it."""
        return Job(function, self.thread.ident)

    def put(self, job: Job) -> None:
        """Queue a job."""
        job.begin()
        job.terminate()  # a scope that is cancelled now has not seen the job
        self._queue.put(job)

    def close(self) -> None:
        """End the thread after the queued jobs, and wait for it; return at once in this thread."""
        self._queue.put(None)
        if not self.is_current:
            self.thread.join()


def _work(jobs: SimpleQueue[Job | None], idle_s: float | None, may_end: Callable[[], bool]) -> None:
    from queue import Empty

    while True:
        try:
            job = jobs.get(timeout=idle_s)
        except Empty:
            if may_end():
                return
            continue
        if job is None:
            return
        job.call()
        del job
