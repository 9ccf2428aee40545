"""Errors that Ctrl-C caused."""

from __future__ import annotations


def was_interrupted(error: BaseException | None) -> bool:
    """Return True if an error is or comes from KeyboardInterrupt: an extension module that is interrupted while it is imported raises ImportError from it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
