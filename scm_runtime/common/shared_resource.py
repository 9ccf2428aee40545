"""A resource that concurrent calls share and that is freed after the last of them, once it is closed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from scm_runtime.common.runs import end_thread_at_exit
from scm_runtime.errors import ForkedError, GeneratorClosedError

Resource = TypeVar("Resource")


class SharedResource(Generic[Resource]):
    """A context manager around every call of a Generator, which yields the resource.

    After ``close`` no call can acquire the resource, and the last release frees it. ``close`` never waits, so a callback may call it. The object does not refer
    to the Generator. So a Generator without references is freed at once, and not by the garbage collector, which does not see memory outside Python.
    """

    def __init__(self, resource: Resource, free: Callable[[Resource], None]) -> None:
        """Share a resource; ``free`` is called once, when no call uses it and none will."""
        self.resource: Resource | None = resource
        """The resource, or None once it is freed."""
        self._free = free
        self._lock = threading.RLock()  # signal handlers may enter it again
        self._users = 0
        self._local = threading.local()
        self._closed = False
        self._process = os.getpid()

    @property
    def is_forked(self) -> bool:
        """True in a forked child of the process that made the resource."""
        return os.getpid() != self._process

    @property
    def closed(self) -> bool:
        """True if calls are refused."""
        return self._closed

    def check(self) -> None:
        """Raise ForkedError in a forked child, and GeneratorClosedError after ``close``."""
        self.check_process()
        if self._closed:
            raise GeneratorClosedError("this Generator is closed: make a new one")

    def check_process(self) -> None:
        """Raise ForkedError in a forked child."""
        if self.is_forked:  # before taking the lock: a thread that does not exist here may hold it
            raise ForkedError(
                "this Generator was made before the process was forked, and neither ONNX Runtime's threads nor a CUDA context survive that. "
                "Make the Generator in the child, or start it by spawn: multiprocessing.get_context('spawn')"
            )

    @property
    def is_held_by_this_thread(self) -> bool:
        """True inside a ``with`` block of this object on this thread."""
        return getattr(self._local, "depth", 0) > 0

    def __enter__(self) -> Resource:
        resource = self.acquire()
        self._local.depth = getattr(self._local, "depth", 0) + 1
        return resource

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._local.depth -= 1
        self.release()
        end_thread_at_exit(error)

    def acquire(self) -> Resource:
        """Return the resource, or raise what ``check`` raises. A later ``release``, on any thread, must follow."""
        self.check()
        with self._lock:
            self._users += 1
        if self._closed:
            self.release()
            self.check()
        assert self.resource is not None  # it is not freed while it has users
        return self.resource

    def release(self) -> None:
        """End a use that ``acquire`` began."""
        with self._lock:
            self._users -= 1
        self._free_if_unused()

    def close(self) -> None:
        """Refuse further calls. It may be called more than once; in a forked child it does nothing."""
        if self.is_forked:
            return
        self._closed = True
        self._free_if_unused()

    def _free_if_unused(self) -> None:
        with self._lock:
            if not self._closed or self._users or self.resource is None:
                return
            resource, self.resource = self.resource, None
        self._free(resource)
