"""Who submits a request: an asyncio task or a thread. The queue lets callers take turns."""

from __future__ import annotations

import sys
import threading
from typing import Any
from weakref import WeakKeyDictionary


class Caller:
    """Stands for a thread or task, which it does not keep alive."""

    __slots__ = ("__weakref__",)


_callers: WeakKeyDictionary[Any, Caller] = WeakKeyDictionary()


def current_caller() -> Caller:
    """Return the caller that the running task is, or the current thread outside of tasks."""
    return _callers.setdefault(_current_task() or threading.current_thread(), Caller())


def _current_task() -> object | None:
    if (asyncio := sys.modules.get("asyncio")) is None:
        return None
    try:
        task: object | None = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None
    return task
