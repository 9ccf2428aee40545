"""Actions at points in time, such as ending a call at its timeout. One thread of the process waits for all of them; it starts with the first."""

from __future__ import annotations

import heapq
import os
import threading
import time
from collections.abc import Callable
from itertools import count

from scm_runtime.common.log import log
from scm_runtime.errors import InferenceError

LONGEST_WAIT_S = 3600.0  # the system limits the time of a single wait
MIN_KEPT = 64  # timers, below which cancelled ones are not searched for


_watcher: _Watcher | None = None


class Timer:
    """An action that is still to come."""

    __slots__ = ("action", "at")

    def __init__(self, at: float, action: Callable[[], object]) -> None:
        self.at, self.action = at, action

    def cancel(self) -> None:
        """Do not call the action, unless that has begun. Frees what the action refers to."""
        self.action = _nothing


class _Watcher:
    """The thread that calls the actions of timers."""

    def __init__(self) -> None:
        from queue import SimpleQueue

        self._new: SimpleQueue[Timer] = SimpleQueue()  # its put may be interrupted by a signal handler that calls it again
        self._thread: threading.Thread | None = None

    def add(self, timer: Timer) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._watch, name="scm-runtime timeouts", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise InferenceError(f"cannot start the thread that ends calls at their timeout: {error}. Raise the limit of threads.") from error
            self._thread = thread
        self._new.put(timer)

    def _watch(self) -> None:
        from queue import Empty

        timers: list[tuple[float, int, Timer]] = []
        numbers, most = count(), MIN_KEPT
        while True:
            try:
                timer = self._new.get(timeout=min(max(timers[0][0] - time.monotonic(), 0), LONGEST_WAIT_S) if timers else None)
            except Empty:
                pass
            else:
                heapq.heappush(timers, (timer.at, next(numbers), timer))
                del timer
            if len(timers) > most:
                timers = [one for one in timers if one[2].action is not _nothing]
                heapq.heapify(timers)
                most = max(MIN_KEPT, 2 * len(timers))
            while timers and timers[0][0] <= time.monotonic():
                _call(heapq.heappop(timers)[2])


def call_at(at: float, action: Callable[[], object]) -> Timer:
    """Call an action at a time of ``time.monotonic``, in a thread of this module. It must not take long: others wait for it.

    Raises:
        InferenceError: the system has no more threads.
    """
    global _watcher
    timer = Timer(at, action)
    if _watcher is None:
        _watcher = _Watcher()
    _watcher.add(timer)
    return timer


def _call(timer: Timer) -> None:
    try:
        timer.action()
    except BaseException:  # noqa: BLE001 - later actions must not depend on it
        log.exception("An action at a timeout failed.")


def _nothing() -> None:
    pass


def _forget() -> None:
    global _watcher
    _watcher = None


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_forget)
