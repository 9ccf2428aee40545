"""Files that are written completely or not at all, reading of regular files only, and files that no other user can change."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from scm_runtime.common.parts import locked_part, sweep_once
from scm_runtime.errors import OutputError


def beside(target: Path, what: str) -> Path:
    """Return an unused hidden path in the target's folder; ``what`` is part of its name."""
    return target.with_name(f".{target.name}.{what}-{os.urandom(6).hex()}")


@contextmanager
def whole_file(target: Path, *, mode: int | None = None) -> Iterator[Path]:
    """Yield a path to write to. The file replaces the target if the block ends without an exception, and is removed otherwise. Raises OSError.

    ``mode`` are the permissions of the file; None for those of the user's umask.
    """
    sweep_once(os.path.abspath(target.parent))  # noqa: PTH100 - Path.resolve would follow links
    with locked_part(target) as part:
        final_mode = part.stat().st_mode if mode is None else mode
        yield part
        part.chmod(final_mode)  # some writers make private files
        part.replace(target)


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """``whole_file`` for a path that the user named: a link stays, and the file it refers to is replaced; a device or pipe is written to directly."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():
        yield target
        return
    with whole_file(target) as part:
        yield part


def open_regular(path: Path, *, follow_links: bool = True) -> BufferedReader:
    """Open a regular file for reading its bytes. Raises OSError for anything else: reading a pipe or a device might never end."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # without O_NONBLOCK, opening a pipe waits for a writer
    if not follow_links:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it must be a regular file")
    return file


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of at most ``max_bytes``. Raises OSError if it cannot be read or is not a regular file, ValueError if it is larger."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ValueError(f"it has more than {max_bytes} bytes")
        return file.read(size)  # read(n) allocates n bytes: not more than the file has


def read_private(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of at most ``max_bytes`` that no other user can have written. Raises OSError."""
    with open_regular(path, follow_links=False) as file:
        found = os.fstat(file.fileno())
        if reason := unsafe_reason(found):
            raise OSError(f"{path.name} {reason}")
        if found.st_size > max_bytes:
            raise OSError(f"{path.name} must have at most {max_bytes} bytes")
        return file.read(found.st_size)


def unsafe_reason(found: os.stat_result) -> str | None:
    """Return why another user could change a file or folder, or None. Root is trusted: root can change the program as well."""
    if sys.platform == "win32":
        return None  # the modes say nothing, and the user's folders admit only the user
    if found.st_uid not in (0, os.geteuid()):
        return f"must be owned by user {os.geteuid()}, but is owned by {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"must not be writable by other users, but has mode {stat.S_IMODE(found.st_mode):o}"
    return None


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn errors of writing a file into OutputError."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write '{path}': {reason}. Choose a folder that you may write to, on a disk with room.") from error
