"""Exhausted memory: NumPy, Pillow, ONNX Runtime and the dynamic loader report it in different ways, and all become OutOfMemoryError."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from scm_runtime.common.message_text import first_line
from scm_runtime.errors import OutOfMemoryError, ScmError

# Lower-case phrases with which ONNX Runtime, its arenas, CUDA, cuDNN, Pillow and the C library report that memory ran out.
PHRASES = ("allocate memory", "out of memory", "out_of_memory", "bad_alloc", "alloc_failed", "allocation_failed", "smaller than requested bytes")
NOT_MAPPED = re.compile(r"([^\s:]+): failed to map segment")  # of the dynamic loader, which does not say why
LIBRARY_BYTES = 1 << 25  # assumed for a library whose path the loader does not name
REQUESTED = re.compile(r"(?:requested buffer of size|smaller than requested bytes of) (\d+)")  # of ONNX Runtime's arenas
SMALLER_BATCH = "Use a smaller batch"
NOEXEC = "its file system is probably mounted with noexec. Install the packages on another."
MORE_MEMORY = "Close other programs or Generators, or raise the memory limit of this process or container"


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an exception says that memory ran out."""
    message = str(error).lower()
    if isinstance(error, MemoryError) or any(phrase in message for phrase in PHRASES):
        return "static tls block" not in message  # the loader's table of thread-local data, not memory, is full
    library = unmapped_library(error)
    return library is not None and not has_room(2 * (library.stat().st_size if library.is_file() else LIBRARY_BYTES))


def unmapped_library(error: BaseException) -> Path | None:
    """Return the library that was found but not mapped into memory: memory ran out, or its file system is mounted noexec. None for other errors."""
    found = NOT_MAPPED.search(str(error))
    return Path(found[1]) if found else None


def has_room(nbytes: int) -> bool:
    """Return True if this many bytes could be allocated now."""
    import mmap

    try:
        mmap.mmap(-1, nbytes).close()  # takes addresses, and no memory until they are used
    except OSError:
        return False
    return True


def out_of_memory_error(what: str, error: BaseException, remedy: str) -> OutOfMemoryError:
    """Return the error for an exception for which ``is_out_of_memory`` is True.

    Args:
        what: what did not fit into memory, and where: "a batch of 8 on the CPU".
        error: the exception. Its message may have the size of the allocation that failed.
        remedy: what the user can do, as a sentence without a full stop.
    """
    requested = REQUESTED.search(str(error))
    size = f": {int(requested[1]) / 1e6:.4g} MB more were requested" if requested else ""
    reason = "" if requested or not str(error) else f" ({first_line(error)})"
    return OutOfMemoryError(f"out of memory for {what}{size}. {remedy}.{reason}")


def memory_errors(what: str | Callable[[], str], remedy: str = SMALLER_BATCH) -> AbstractContextManager[None]:
    """Turn errors in a block for which ``is_out_of_memory`` is True into OutOfMemoryError, with the arguments of ``out_of_memory_error``.

    ``what`` may be a function that returns the text.
    """
    return _MemoryErrors(what, remedy)


class _MemoryErrors(AbstractContextManager[None]):
    __slots__ = ("_remedy", "_what")

    def __init__(self, what: str | Callable[[], str], remedy: str) -> None:
        self._what, self._remedy = what, remedy

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(error, ScmError) or not isinstance(error, MemoryError | ImportError | OSError) or not is_out_of_memory(error):
            return
        raise out_of_memory_error(self._what if isinstance(self._what, str) else self._what(), error, self._remedy) from error
