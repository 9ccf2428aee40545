"""Keeps the threads of this process from calling CUDA while one of them captures a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Captures:
    """Lets one thread of the process capture a CUDA graph while none of the others that work for us calls CUDA.

    ONNX Runtime captures in the mode in which an allocation in any thread of the process, also for another device, is an error there and spoils the
    capture. What the host does in threads of its own we cannot hold back.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working = self._waiting = 0
        self._capturing = False
        self._here = threading.local()

    @contextmanager
    def working(self) -> Iterator[None]:
        """A job that may call CUDA."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Within a job or not: while it waits for another thread's, which may want to capture."""
        if not getattr(self._here, "working", False):
            yield
            return
        self._leave()
        try:
            yield
        finally:
            self._enter()

    def _enter(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._capturing and not self._waiting)
            self._working += 1
        self._here.working = True

    def _leave(self) -> None:
        self._here.working = False
        with self._changed:
            self._working -= 1
            self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within a job: until the other jobs stand still, and while they do."""
        with self._changed:
            self._working -= 1
            self._waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._capturing and not self._working)
            self._waiting -= 1
            self._capturing = True
        try:
            yield
        finally:
            with self._changed:
                self._capturing = False
                self._working += 1
                self._changed.notify_all()


CAPTURES = Captures()
