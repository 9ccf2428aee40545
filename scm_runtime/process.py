"""What a fork and the end of the process do to sessions and threads that are open."""

from __future__ import annotations

import atexit
import os
import time
import weakref
from typing import Any, Protocol

EXIT_WAIT_S = 5.0  # that the interpreter's end waits, in all, for evaluations under way


class Stoppable(Protocol):
    """Something with a thread."""

    def close(self) -> None: ...

    def join(self, timeout: float) -> None: ...


_threads: weakref.WeakSet[Any] = weakref.WeakSet()
_sessions: weakref.WeakSet[Any] = weakref.WeakSet()


def stop_at_exit(running: Stoppable) -> None:
    """Close it at the interpreter's end, and wait for a while: a daemon thread in an evaluation would meet ONNX Runtime taken apart."""
    _threads.add(running)


def leave_to_parent(session: object) -> None:
    """Never free this in a forked child: ONNX Runtime would wait there for threads that only the parent has, at the latest when the child ends."""
    _sessions.add(session)


def _stop_all() -> None:
    running = list(_threads)
    for one in running:
        one.close()
    deadline = time.monotonic() + EXIT_WAIT_S
    for one in running:
        while (left := deadline - time.monotonic()) > 0:
            try:
                one.join(left)
            except KeyboardInterrupt:  # by a user who has no patience: to go on without would abort the process
                continue
            break


def _keep_all() -> None:
    if not len(_sessions):
        return
    import ctypes

    for session in list(_sessions):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))  # a reference that nobody has, so that nobody can drop it


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_keep_all)
