"""Who is using a Generator: the calls that run, and whether this is still the process that made it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from scm_runtime.common.runs import end_thread_at_exit
from scm_runtime.errors import ForkedError, GeneratorClosedError

Resource = TypeVar("Resource")


class Usage(Generic[Resource]):
    """A context manager around every call, which yields what is used.

    After ``end`` no call enters, and the last one to leave closes: nobody waits, so a callback may close too. It does not know the Generator: one that is
    dropped goes at once, not when the garbage collector comes, which knows nothing of gigabytes outside Python.
    """

    def __init__(self, resource: Resource, close: Callable[[Resource], None]) -> None:
        """``close`` is called once, when nothing runs and nothing will."""
        self.resource: Resource | None = resource
        self._close = close
        self._lock = threading.RLock()  # re-entered by signal handlers
        self._running = 0
        self._here = threading.local()
        self._ended = False
        self._process = os.getpid()

    @property
    def foreign(self) -> bool:
        """Whether this is a forked child of the process that made it."""
        return os.getpid() != self._process

    @property
    def ended(self) -> bool:
        """Whether calls are refused."""
        return self._ended

    def check(self) -> None:
        """Raise ForkedError in a forked child, GeneratorClosedError after the end."""
        self.check_process()
        if self._ended:
            raise GeneratorClosedError("this Generator is closed: make a new one")

    def check_process(self) -> None:
        """Raise ForkedError in a forked child."""
        if self.foreign:  # before the lock: a thread that is not here may hold it
            raise ForkedError(
                "this Generator was made before the process was forked, and neither ONNX Runtime's threads nor a CUDA context survive that. "
                "Make the Generator in the child, or start it by spawn: multiprocessing.get_context('spawn')"
            )

    @property
    def inside(self) -> bool:
        """Whether this thread is within a ``with`` block of this."""
        return getattr(self._here, "depth", 0) > 0

    def __enter__(self) -> Resource:
        resource = self.enter()
        self._here.depth = getattr(self._here, "depth", 0) + 1
        return resource

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._here.depth -= 1
        self.leave()
        end_thread_at_exit(error)

    def enter(self) -> Resource:
        """A call begins: raises what ``check`` raises, or is to be followed by ``leave``, in whichever thread."""
        self.check()
        with self._lock:
            self._running += 1
        if self._ended:
            self.leave()
            self.check()
        assert self.resource is not None  # while somebody runs
        return self.resource

    def leave(self) -> None:
        """A call has ended."""
        with self._lock:
            self._running -= 1
        self._close_after_the_last()

    def end(self) -> None:
        """Let no more calls in. Allowed more than once, and in a forked child, where it does nothing."""
        if self.foreign:
            return
        self._ended = True
        self._close_after_the_last()

    def _close_after_the_last(self) -> None:
        with self._lock:
            if not self._ended or self._running or self.resource is None:
                return
            resource, self.resource = self.resource, None
        self._close(resource)
