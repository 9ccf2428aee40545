"""A function that runs in a thread of its own while its caller does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable


class StoppedError(Exception):
    """Ends a function after ``Background.stop``."""


class Background:
    """A call of a function in a new thread. Where no thread can be started, the function is called at once.

    The exit of the process does not wait for the thread, so the function must leave nothing half done.
    """

    def __init__(self, function: Callable[[Callable[[], None]], None], name: str) -> None:
        """Begin the call.

        Args:
            function: what to call. Its argument is a function that it calls often, and that raises StoppedError after ``stop``.
            name: name of the thread.
        """
        self._stopped = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = threading.Thread(target=self._call, args=(function,), name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system has no more threads
            self._thread = None
            self._call(function)

    def finish(self) -> None:
        """Wait until the function has ended, and raise its error."""
        if self._thread is not None:
            self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def stop(self) -> None:
        """Let the function end early. Returns at once."""
        self._stopped = True

    def _call(self, function: Callable[[Callable[[], None]], None]) -> None:
        try:
            function(self._check_stopped)
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            self._error = error

    def _check_stopped(self) -> None:
        if self._stopped:
            raise StoppedError
