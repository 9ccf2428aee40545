"""Who is using a Generator: the calls that run, and whether this is still the process that made it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from scm_runtime.errors import ForkedError, GeneratorClosedError


class Usage:
    """A context manager around every call. After ``end`` no call enters, and the last one to leave closes: nobody waits, so a callback may close too."""

    def __init__(self, close: Callable[[], None]) -> None:
        """``close`` is called once, when nothing runs and nothing will."""
        self._close = close
        self._lock = threading.Lock()
        self._running = 0
        self._ended = False
        self._process = os.getpid()

    @property
    def foreign(self) -> bool:
        """Whether this is a forked child of the process that made it."""
        return os.getpid() != self._process

    def check(self) -> None:
        """Raise ForkedError in a forked child, GeneratorClosedError after the end."""
        if self.foreign:  # before the lock: a thread that is not here may hold it
            raise ForkedError(
                "this Generator was made before the process was forked, and neither ONNX Runtime's threads nor a CUDA context survive that. "
                "Make the Generator in the child, or start it by spawn: multiprocessing.get_context('spawn')"
            )
        if self._ended:
            raise GeneratorClosedError("this Generator is closed: make a new one")

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *_: object) -> None:
        self.leave()

    def enter(self) -> None:
        """A call begins: raises what ``check`` raises, or is to be followed by ``leave``, in whichever thread."""
        self.check()
        with self._lock:
            self.check()
            self._running += 1

    def leave(self) -> None:
        """A call has ended."""
        with self._lock:
            self._running -= 1
            last = self._ended and not self._running
        if last:
            self._close()

    def end(self) -> None:
        """Let no more calls in. Allowed more than once, and in a forked child, where it does nothing."""
        if self.foreign:
            return
        with self._lock:
            last, self._ended = not self._ended and not self._running, True
        if last:
            self._close()
