"""Errors that only the exporter raises. They extend the tree in :mod:`scm_runtime.errors`.

    ScmError                            base of all errors of scm_runtime and scm_export
    └── ExportError
        ├── CheckpointError             (ValueError) a checkpoint cannot be read or does not fit its family
        │   └── CheckpointNotFoundError (FileNotFoundError) there is no checkpoint at the path
        └── VerificationError           (RuntimeError) the bundle does not compute what the checkpoint computes

The classes in parentheses are built-in errors that the class also derives from.
"""

from __future__ import annotations

from scm_runtime.bundle.manifest import Verification
from scm_runtime.common.message_text import safe_message
from scm_runtime.errors import ScmError


class ExportError(ScmError):
    """Base class of the exporter's errors; raised itself if torch or onnx cannot translate a network."""


class CheckpointError(ExportError, ValueError):
    """A checkpoint cannot be read, or does not fit its family. Text of the file in the message is escaped and shortened."""

    def __init__(self, message: str) -> None:
        super().__init__(safe_message(message))


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given path."""


class VerificationError(ExportError, RuntimeError):
    """The bundle does not compute what the checkpoint computes."""

    def __init__(self, message: str, report: Verification | None = None) -> None:
        """``report`` holds all compared cases; None if nothing could be compared."""
        super().__init__(message)
        self.report = report
