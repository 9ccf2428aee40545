"""The runs of ONNX Runtime that are in flight. Closing a Generator terminates its own; cancelling a CancelScope those in it; the exit of the process all.

The exit of the process also waits for them: a thread that returns from ONNX Runtime into an interpreter that is shutting down aborts the process. This module
takes no lock that a signal handler, a finalizer or a forked child could find locked: single operations on a dict are atomic between threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

from scm_runtime.errors import GenerationCancelledError, GeneratorClosedError, ScmError

Result = TypeVar("Result")

_in_flight: dict[Run, None] = {}
_exit_thread: int | None = None  # the thread that exits the process, once it does


class Run:
    """A run of ONNX Runtime, in flight inside a ``with`` block or between ``begin`` and ``end``."""

    __slots__ = ("_ended", "_thread", "options", "registry", "scope")

    def __init__(self, registry: RunRegistry, options: Any | None, thread: int | None = None) -> None:
        """Describe a run.

        Args:
            registry: the registry of its Generator.
            options: the run's own ``onnxruntime.RunOptions``, or None if it cannot be terminated.
            thread: identifier of the thread that runs it; by default the current one.
        """
        self.registry, self.options = registry, options
        self.scope = current_scope()
        """The scope that the run belongs to: that of the thread which described it."""
        self._thread = threading.get_ident() if thread is None else thread
        self._ended = threading.Lock()
        self._ended.acquire()

    @property
    def terminated(self) -> bool:
        """True if the run was told to end early."""
        return self.options is not None and bool(self.options.terminate)

    def terminate(self) -> None:
        """End the run at its next operator. Returns at once."""
        if self.options is not None:
            self.options.terminate = True

    def error(self) -> ScmError:
        """Return a new error for a run that was terminated: it says by what."""
        if self.scope is not None and self.scope.cancelled and not self.registry.terminated:
            return self.scope.error()
        return closed_error()

    def __enter__(self) -> Self:
        try:
            self.begin()
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

    @property
    def ended(self) -> bool:
        """True after ``end``."""
        return not self._ended.locked()

    def end(self) -> None:
        """Mark the run as ended. It may be called more than once."""
        _in_flight.pop(self, None)  # a forked child has forgotten it
        if self._ended.locked():
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

    def call_in_run(self, options: Any, function: Callable[[Run], Result], *, shared: bool = False) -> Result:
        """Call a function with a new run, in flight until the function has ended, and return its result. Raises what ``check`` raises.

        Args:
            options: the run's own ``onnxruntime.RunOptions``.
            function: what to call.
            shared: the runs that this thread begins in the function are part of this run, and take its options: see ``current_run``. Once it is terminated, the
                present one ends, and each later one at its first operator.
        """
        run, outer = Run(self, options), _current.run
        try:
            with run:
                if shared:
                    _current.run = run
                return function(run)
        finally:
            # On the main thread a signal handler may raise at the beginning of a call, also of the block's exit. Then the run ends here.
            _current.run = outer
            run.end()

    def current_run(self) -> Run | None:
        """Return the shared run that a run of this thread takes part in; None if there is none, or it belongs to another registry or CancelScope."""
        run = _current.run
        if run is None or run.registry is not self or run.scope is not _current.scope:
            return None
        return run

    @property
    def terminated(self) -> bool:
        """True if no run may begin: after ``terminate``, and during the exit of the process except on the exiting thread."""
        return self._terminated or is_exiting()

    def check(self) -> None:
        """Raise GeneratorClosedError if no run may begin, and the error of the current CancelScope if it is cancelled."""
        if self._terminated or (_exit_thread is not None and is_exiting()):
            raise closed_error()
        scope = _current.scope
        if scope is not None and scope._error is not None:
            raise scope.error()

    def terminate(self) -> None:
        """End the runs in flight at their next operator, and let no other begin. Returns at once."""
        self._terminated = True
        _terminate(self._own_runs())

    def wait(self) -> None:
        """Wait until no run is in flight on another thread."""
        _wait(self._own_runs())

    def _own_runs(self) -> list[Run]:
        return [run for run in list(_in_flight) if run.registry is self]


class CancelScope:
    """The runs of one call, or of one batch of requests, which can be ended together."""

    def __init__(self) -> None:
        self._error: Callable[[], ScmError] | None = None

    @property
    def cancelled(self) -> bool:
        """True after ``cancel``."""
        return self._error is not None

    def cancel(self, error: Callable[[], ScmError]) -> None:
        """End the runs at their next operator, and let no other begin. Returns at once. Any thread may call it.

        Args:
            error: makes the error that is raised instead. The first call of ``cancel`` decides.
        """
        if self._error is None:
            self._error = error
        _terminate([run for run in list(_in_flight) if run.scope is self])

    def error(self) -> ScmError:
        """Return a new error of a cancelled scope."""
        assert self._error is not None
        return self._error()

    def call(self, function: Callable[[], Result]) -> Result:
        """Call a function and return its result. The runs that this thread begins in it belong to this scope, and not to one around it."""
        outer = _current.scope
        _current.scope = self
        try:
            return function()
        finally:
            _current.scope = outer  # no call, so that no signal handler can raise before it


class _Current(threading.local):
    scope: CancelScope | None = None
    run: Run | None = None


_current = _Current()


def current_scope() -> CancelScope | None:
    """Return the scope that is active on this thread."""
    return _current.scope


def closed_error(when: str = "while this call ran") -> GeneratorClosedError:
    """Return a new error for a call that was terminated or refused."""
    return GeneratorClosedError(f"the Generator was closed {when}: make a new one" if _exit_thread is None else f"the process ended {when}")


def interrupted_error() -> GenerationCancelledError:
    """Return a new error for the runs of a call whose thread left it because a signal handler raised. The caller gets the handler's exception instead."""
    return GenerationCancelledError("the call was interrupted")


def wait_despite_signals(wait: Callable[[], None]) -> None:
    """Wait, and wait again if a signal handler raises, as that of Ctrl-C does: for things that must have ended."""
    while True:
        try:
            return wait()
        except BaseException:  # noqa: BLE001 - a signal handler may raise anything
            continue


def exit_began() -> bool:
    """Return True once a thread is exiting the process."""
    return _exit_thread is not None


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
        run.terminate()


def _wait(runs: list[Run]) -> None:
    for run in runs:
        run.wait()
