"""The boundary around the readers: whatever a library raises for a damaged or hostile file becomes a CheckpointError that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from scm_export.errors import CheckpointError
from scm_runtime.common.message_text import first_line
from scm_runtime.errors import ScmError

PARSERS = (ValueError, SafetensorError)  # errors that need no name: their messages are about the file


@contextmanager
def reading(source: Path, remedy: str = "Copy or save it again.") -> Iterator[None]:
    """Within the block, convert exceptions to CheckpointError. The block must only read and check the file; the message names the type of the exception."""
    try:
        yield
    except ScmError:
        raise
    except OSError as error:
        raise CheckpointError(f"'{source}' cannot be read: {error.strerror or first_line(error)}. {remedy}") from error
    except Exception as error:
        what = first_line(error) if isinstance(error, PARSERS) else f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"'{source}' is not a readable {source.suffix or 'checkpoint'} file, or is damaged ({what}). {remedy}") from error
