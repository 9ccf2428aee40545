"""The boundary around the readers: whatever a library raises for a damaged or hostile file becomes a CheckpointError that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from scm_export.errors import CheckpointError
from scm_runtime.common.memory import MORE_MEMORY, is_out_of_memory, out_of_memory_error
from scm_runtime.common.message_text import first_line
from scm_runtime.errors import ScmError

PARSERS = (ValueError, SafetensorError)  # errors that need no name: their messages are about the file


@contextmanager
def reading(source: Path, remedy: str = "Copy or save it again.") -> Iterator[None]:
    """Within the block, convert exceptions to CheckpointError. The block must only read and check the file; the message names the type of the exception.

    If memory runs out, raises OutOfMemoryError.
    """
    try:
        yield
    except ScmError:
        raise
    except Exception as error:
        raise _converted(source, error, remedy) from error


def _converted(source: Path, error: Exception, remedy: str) -> ScmError:
    if is_out_of_memory(error):
        return out_of_memory_error(f"the checkpoint '{source}'", error, MORE_MEMORY)
    if isinstance(error, OSError):
        return CheckpointError(f"'{source}' cannot be read: {error.strerror or first_line(error)}. {remedy}")
    what, report = first_line(error), ""
    if not isinstance(error, PARSERS):
        what, report = f"{type(error).__name__}: {what}", " If it is intact, this is a bug in scm-export: please report it."
    return CheckpointError(f"'{source}' is not a readable {source.suffix or 'checkpoint'} file, or is damaged ({what}). {remedy}{report}")
