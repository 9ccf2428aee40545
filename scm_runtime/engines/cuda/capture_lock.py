"""A lock that keeps other threads of this package from calling CUDA while one of them captures a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CaptureLock:
    """A process-wide lock: shared by jobs that may call CUDA, exclusive while one of them captures a CUDA graph.

    The captures are in CUDA's thread-local mode, in which allocations in other threads are allowed. But opening or closing a session in another thread
    synchronizes the whole device, which CUDA refuses while a stream of it captures. Threads of the host application do not take this lock.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders = self._waiting = 0
        self._capturing = False
        self._local = threading.local()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock for a job that may call CUDA. Waits for a capture that is running or requested."""
        self._acquire()
        try:
            yield
        finally:
            self._release()

    @property
    def held(self) -> bool:
        """Whether this thread holds the shared lock."""
        return getattr(self._local, "held", False)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Release this thread's shared lock while it waits for a job of another thread, which may want to capture."""
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
        """Upgrade this thread's shared lock for a capture: wait until no other job holds the lock, and keep new ones waiting."""
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
