"""Keeps the threads of this process from calling CUDA while one of them captures a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CaptureLock:
    """Lets one thread of the process capture a CUDA graph while none of the others that work for us calls CUDA.

    ONNX Runtime captures in the mode in which an allocation in any thread of the process, also for another device, is an error there and spoils the
    capture. What the host does in threads of its own we cannot hold back.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders = self._waiting = 0
        self._capturing = False
        self._local = threading.local()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """A job that may call CUDA."""
        self._acquire()
        try:
            yield
        finally:
            self._release()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Within a job or not: while it waits for another thread's, which may want to capture."""
        if not getattr(self._local, "held", False):
            yield
            return
        self._release()
        try:
            yield
        finally:
            self._acquire()

    def _acquire(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._capturing and not self._waiting)
            self._holders += 1
        self._local.held = True

    def _release(self) -> None:
        self._local.held = False
        with self._changed:
            self._holders -= 1
            self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Within a job: until the other jobs stand still, and while they do."""
        with self._changed:
            self._holders -= 1
            self._waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._capturing and not self._holders)
            self._waiting -= 1
            self._capturing = True
        try:
            yield
        finally:
            with self._changed:
                self._capturing = False
                self._holders += 1
                self._changed.notify_all()


CAPTURE_LOCK = CaptureLock()
