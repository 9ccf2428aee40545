"""The calls into ONNX Runtime that are in flight: closing a Generator terminates its own, and the end of the process those of all.

The end of the process also waits for them: a thread that comes back from ONNX Runtime into an interpreter that is being taken apart aborts the process.
Nothing here takes a lock that a signal handler, a finalizer or a forked child could find taken: single operations on a dict are atomic between threads.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self

from scm_runtime.errors import GeneratorClosedError

_in_flight: dict[Run, None] = {}
_exit_thread: int | None = None  # the thread that ends the process, once it does


class Run:
    """A call into ONNX Runtime, in flight within a ``with`` block, or from ``begin`` to ``end``."""

    __slots__ = ("_ended", "_thread", "options", "registry")

    def __init__(self, registry: RunRegistry, options: Any | None, thread: int | None = None) -> None:
        """``options``, ONNX Runtime's RunOptions, are this run's alone; None for what cannot be terminated. ``thread`` runs it, by default this one."""
        self.registry, self.options = registry, options
        self._thread = threading.get_ident() if thread is None else thread
        self._ended = threading.Lock()
        self._ended.acquire()

    @property
    def terminated(self) -> bool:
        """Whether it was told to end early."""
        return self.options is not None and bool(self.options.terminate)

    def __enter__(self) -> Self:
        self.begin()
        try:
            self.registry.check()  # now that whoever terminates would find it
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.end()

    def begin(self) -> None:
        """It is in flight from now on."""
        _in_flight[self] = None

    def end(self) -> None:
        """It is not any more."""
        _in_flight.pop(self, None)  # in a forked child it was forgotten
        self._ended.release()

    def wait(self) -> None:
        """Until it has ended; at once in the thread that runs it, as a signal handler may be."""
        if self._thread != threading.get_ident():
            with self._ended:
                pass


class RunRegistry:
    """The runs of one Generator, whatever engines and threads they are in."""

    def __init__(self) -> None:
        self._terminated = False

    def run(self, options: Any | None = None, thread: int | None = None) -> Run:
        """A run to come, see Run. Entering it raises what ``check`` raises."""
        return Run(self, options, thread)

    def check(self) -> None:
        """Raise GeneratorClosedError if no run may begin any more: after ``terminate``, and at the end of the process but for the thread that ends it."""
        if self._terminated or is_exiting():
            raise closed_error()

    def terminate(self) -> None:
        """End the runs in flight at their next operator, and let no other begin. Waits for nothing."""
        self._terminated = True
        _terminate(self._own_runs())

    def wait(self) -> None:
        """Until no run is in flight, but for one of this thread."""
        _wait(self._own_runs())

    def _own_runs(self) -> list[Run]:
        return [run for run in list(_in_flight) if run.registry is self]


def closed_error(when: str = "while this call ran") -> GeneratorClosedError:
    """A new error for a call that was terminated or refused."""
    return GeneratorClosedError(f"the Generator was closed {when}: make a new one" if _exit_thread is None else f"the process ended {when}")


def is_exiting() -> bool:
    """Whether the process ends, in another thread than this."""
    return _exit_thread is not None and _exit_thread != threading.get_ident()


def end_thread_at_exit(error: BaseException | None) -> None:
    """Where a call failed because the process ends: end its thread without a word, as Python is about to leave it behind anyway."""
    if isinstance(error, GeneratorClosedError) and is_exiting():
        raise SystemExit from error


def terminate_all() -> None:
    """The process ends, in this thread: end all runs in flight, and let none begin but in this thread, for hooks that come later."""
    global _exit_thread
    _exit_thread = threading.get_ident()
    _terminate(list(_in_flight))


def wait_for_all() -> None:
    """Until no run is in flight, but for one of this thread."""
    _wait(list(_in_flight))


def forget_all() -> None:
    """In a forked child, where no thread is left to end them, and whose own end is another."""
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
