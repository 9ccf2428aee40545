"""SIGTERM and SIGHUP end a command as Ctrl-C does: with everything cleaned up. Only the command lines do this; a library must not install signal handlers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NAMES = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP
_received: signal.Signals | None = None


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt in this block when the process is told to end, once: a terminal that closes may send SIGHUP twice, during the cleanup too."""
    global _received
    _received = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        global _received
        if os.getpid() != process:  # a forked child ends as it would without this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif _received is None:
            _received = signal.Signals(number)
            raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]  # nohup ignores SIGHUP
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def interruption() -> tuple[str, int]:
    """Return a word for the signal that interrupted the command, and the exit code: 128 + its number, as in a shell."""
    if _received is None:
        return "Interrupted", 128 + signal.SIGINT
    return f"Ended by {_received.name}", 128 + _received
