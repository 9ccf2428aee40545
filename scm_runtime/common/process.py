"""Handling of the end of the process and of forks, for threads, runs and sessions."""

from __future__ import annotations

import atexit
import os
import time
import weakref
from typing import Any, Protocol

from scm_runtime.common import runs

CALLBACK_WAIT_S = 5.0  # limit for code of the user, which may hang: for all threads at exit, and when a Generator is closed


class Stoppable(Protocol):
    """An object with a thread that can be stopped."""

    def close(self) -> None:
        """Let the thread end. Returns at once."""

    def join(self, timeout: float) -> None:
        """Wait for the end of the thread, for at most ``timeout`` seconds."""


_threads: weakref.WeakSet[Any] = weakref.WeakSet()
_sessions: weakref.WeakSet[Any] = weakref.WeakSet()


def stop_at_exit(stoppable: Stoppable) -> None:
    """Close an object when the interpreter exits, and wait for its thread for a limited time, because it may be in code of the user."""
    _threads.add(stoppable)


def leave_to_parent(session: object) -> None:
    """Never free a session in a forked child: ONNX Runtime would wait for threads that only the parent has, at the latest when the child exits."""
    _sessions.add(session)


def _stop_all() -> None:
    runs.terminate_all()
    stoppables = list(_threads)
    for stoppable in stoppables:
        stoppable.close()
    runs.wait_despite_signals(runs.wait_for_all)
    deadline = time.monotonic() + CALLBACK_WAIT_S
    for stoppable in stoppables:
        runs.wait_despite_signals(lambda one=stoppable: one.join(max(deadline - time.monotonic(), 0.0)))  # type: ignore[misc]  # the default binds the loop's variable
    runs.wait_despite_signals(runs.wait_for_all)  # the threads may have started runs while they ended: device memory is freed on another thread


def _leave_all() -> None:
    global _threads
    _threads = weakref.WeakSet()
    runs.forget_all()
    if not len(_sessions):
        return
    import ctypes

    for session in list(_sessions):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))  # a reference that nothing can release


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_leave_all)
