"""The runs of ONNX Runtime that are in flight. Closing a Generator terminates its own; the exit of the process terminates all.

The exit of the process also waits for them: a thread that returns from ONNX Runtime into an interpreter that is shutting down aborts the process. This module
takes no lock that a signal handler, a finalizer or a forked child could find locked: single operations on a dict are atomic between threads.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self

from scm_runtime.errors import GeneratorClosedError

_in_flight: dict[Run, None] = {}
_exit_thread: int | None = None  # the thread that exits the process, once it does


class Run:
    """A run of ONNX Runtime, in flight inside a ``with`` block or between ``begin`` and ``end``."""

    __slots__ = ("_ended", "_thread", "options", "registry")

    def __init__(self, registry: RunRegistry, options: Any | None, thread: int | None = None) -> None:
        """Describe a run.

        Args:
            registry: the registry of its Generator.
            options: the run's own ``onnxruntime.RunOptions``, or None if it cannot be terminated.
            thread: identifier of the thread that runs it; by default the current one.
        """
        self.registry, self.options = registry, options
        self._thread = threading.get_ident() if thread is None else thread
        self._ended = threading.Lock()
        self._ended.acquire()

    @property
    def terminated(self) -> bool:
        """True if the run was told to end early."""
        return self.options is not None and bool(self.options.terminate)

    def __enter__(self) -> Self:
        self.begin()
        try:
            self.registry.check()  # after begin, so that a concurrent terminate finds this run or is seen here
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.end()

    def begin(self) -> None:
        """Mark the run as in flight."""
        _in_flight[self] = None

    def end(self) -> None:
        """Mark the run as ended."""
        _in_flight.pop(self, None)  # a forked child has forgotten it
        self._ended.release()

    def wait(self) -> None:
        """Wait until the run has ended; return at once on the thread that runs it, where a signal handler may be the caller."""
        if self._thread != threading.get_ident():
            with self._ended:
                pass


class RunRegistry:
    """The runs of one Generator, on all its engines and threads."""

    def __init__(self) -> None:
        self._terminated = False

    def run(self, options: Any | None = None, thread: int | None = None) -> Run:
        """Return a new run, with the arguments of ``Run``. Entering it raises what ``check`` raises."""
        return Run(self, options, thread)

    def check(self) -> None:
        """Raise GeneratorClosedError if no run may begin: after ``terminate``, and during the exit of the process except on the exiting thread."""
        if self._terminated or is_exiting():
            raise closed_error()

    def terminate(self) -> None:
        """End the runs in flight at their next operator, and let no other begin. Returns at once."""
        self._terminated = True
        _terminate(self._own_runs())

    def wait(self) -> None:
        """Wait until no run is in flight on another thread."""
        _wait(self._own_runs())

    def _own_runs(self) -> list[Run]:
        return [run for run in list(_in_flight) if run.registry is self]


def closed_error(when: str = "while this call ran") -> GeneratorClosedError:
    """Return a new error for a call that was terminated or refused."""
    return GeneratorClosedError(f"the Generator was closed {when}: make a new one" if _exit_thread is None else f"the process ended {when}")


def is_exiting() -> bool:
    """Return True if another thread is exiting the process."""
    return _exit_thread is not None and _exit_thread != threading.get_ident()


def end_thread_at_exit(error: BaseException | None) -> None:
    """End the current thread silently if its call failed because the process is exiting: Python abandons such threads anyway."""
    if isinstance(error, GeneratorClosedError) and is_exiting():
        raise SystemExit from error


def terminate_all() -> None:
    """End all runs at the exit of the process. From then on runs may begin only on this thread, where later exit handlers need them."""
    global _exit_thread
    _exit_thread = threading.get_ident()
    _terminate(list(_in_flight))


def wait_for_all() -> None:
    """Wait until no run is in flight on another thread."""
    _wait(list(_in_flight))


def forget_all() -> None:
    """Forget all runs in a forked child, where their threads do not exist, and that the parent may be exiting."""
    global _exit_thread
    _in_flight.clear()
    _exit_thread = None


def _terminate(runs: list[Run]) -> None:
    for run in runs:
        if run.options is not None:
            run.options.terminate = True


def _wait(runs: list[Run]) -> None:
    for run in runs:
        run.wait()
