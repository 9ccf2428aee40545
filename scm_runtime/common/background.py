"""A function that runs in a thread of its own while its caller does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable


def in_background(check: Callable[[], None], name: str) -> Callable[[], None]:
    """Call a function in a new thread, and return a function that waits for its end and raises its error.

    The exit of the process does not wait for the thread, so it must leave nothing half done. Where no thread can be started, the function is called here, now.
    """
    errors: list[BaseException] = []

    def call() -> None:
        try:
            check()
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=call, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the system has no more threads
        call()

    def finish() -> None:
        if thread.ident is not None:
            thread.join()
        if errors:
            raise errors.pop()

    return finish
