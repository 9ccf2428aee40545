"""What a fork and the end of the process do to sessions, runs and threads."""

from __future__ import annotations

import atexit
import os
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from scm_runtime.common import runs

CALLBACK_WAIT_S = 5.0  # for code of the user's, which may hang: at the end of the process in all, and when a Generator is closed


class Stoppable(Protocol):
    """Something with a thread."""

    def close(self) -> None: ...

    def join(self, timeout: float) -> None: ...


_threads: weakref.WeakSet[Any] = weakref.WeakSet()
_sessions: weakref.WeakSet[Any] = weakref.WeakSet()


def stop_at_exit(running: Stoppable) -> None:
    """Close it at the interpreter's end, and wait for a while: its thread may be in code of the user's."""
    _threads.add(running)


def leave_to_parent(session: object) -> None:
    """Never free this in a forked child: ONNX Runtime would wait there for threads that only the parent has, at the latest when the child ends."""
    _sessions.add(session)


def _stop_all() -> None:
    runs.terminate_all()
    running = list(_threads)
    for one in running:
        one.close()
    _insist(runs.wait_for_all)
    deadline = time.monotonic() + CALLBACK_WAIT_S
    for one in running:
        _insist(lambda one=one: one.join(max(deadline - time.monotonic(), 0.0)))  # type: ignore[misc]  # the lambda's default binds the loop's variable
    _insist(runs.wait_for_all)  # for what the threads did last: a device's memory is given back in another


def _insist(wait: Callable[[], None]) -> None:
    """Wait, whatever a user does who has no patience: to go on without would abort the process."""
    while True:
        try:
            return wait()
        except KeyboardInterrupt:
            continue


def _leave_all() -> None:
    global _threads
    _threads = weakref.WeakSet()
    runs.forget_all()
    if not len(_sessions):
        return
    import ctypes

    for session in list(_sessions):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))  # a reference that nobody has, so that nobody can drop it


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_leave_all)
