"""Ctrl-C while packages are imported: some crash or raise other errors if they are interrupted then. This module imports nothing that takes time."""

from __future__ import annotations

import os
import signal
from types import FrameType


def exit_at_interrupt() -> None:
    """End the process at Ctrl-C at once, without cleanup, until ``raise_at_interrupt``: for a program that imports its packages and has begun nothing."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def raise_at_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again after ``exit_at_interrupt``. Does nothing in other programs."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(number: int, frame: FrameType | None) -> None:
    os.write(2, b"Interrupted\n")
    os._exit(128 + number)


def was_interrupted(error: BaseException | None) -> bool:
    """Return True if an error is or comes from KeyboardInterrupt: an extension module that is interrupted while it is imported raises ImportError from it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
