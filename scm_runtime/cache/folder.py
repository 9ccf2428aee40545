"""The folder of the graph cache: where it is, whether others can write to it, and how large it may become."""

from __future__ import annotations

import logging
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from scm_runtime.common.files import unsafe_reason
from scm_runtime.common.log import log_once
from scm_runtime.errors import InvalidArgumentError

MAX_BYTES = 4 << 30


def usable_folder(folder: str | os.PathLike[str] | Literal[False] | None, subfolders: Sequence[str]) -> Path | None:
    """Return the folder of the cache, created if necessary, or None if there is no cache or its folder is unusable, which is logged.

    The arguments are those of ``look_for_folder``.
    """
    root, reason = look_for_folder(folder, subfolders)
    if reason:
        # If the user did not configure a cache, this is not worth a warning.
        level = logging.INFO if folder is None and "SCM_CACHE_DIR" not in os.environ else logging.WARNING
        log_once(level, f"no cache of optimized graphs: {reason}", key="no cache of optimized graphs")
    return root


def look_for_folder(folder: str | os.PathLike[str] | Literal[False] | None, subfolders: Sequence[str]) -> tuple[Path | None, str | None]:
    """Return the folder of the cache, created if necessary, or the reason why it is unusable and the remedy. Both are None if there is no cache.

    Args:
        folder: False for no cache; None for the folder in SCM_CACHE_DIR (no cache if it is set and empty) or the platform's folder for caches.
        subfolders: names of folders in it, which other users must not be able to write to.

    Raises:
        InvalidArgumentError: ``folder`` is not a path.
    """
    named = os.environ.get("SCM_CACHE_DIR") if folder is None else folder
    if named is False or named == "":
        return None, None
    if named is not None and not isinstance(named, str | os.PathLike):
        raise InvalidArgumentError(f"cache_dir must be a folder, False for no cache, or None, got {named!r}")
    try:
        root = (_platform_folder() if named is None else Path(named).expanduser()).resolve()
        for path in (root, *(root / name for name in subfolders)):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if reason := _unsafe_reason(path, is_subfolder=path != root):
                raise OSError(f"'{path}' {reason}")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no home folder; ValueError: a null character
        remedy = "Set SCM_CACHE_DIR to a folder that only you can write to (a new one is created), or to '' for no cache."
        return None, f"{error}. {remedy}"
    return root, None


def max_bytes() -> int:
    """Return SCM_CACHE_MAX_BYTES, or 4 GiB if it is not set. Raises InvalidArgumentError if it is not a number of bytes."""
    value = os.environ.get("SCM_CACHE_MAX_BYTES") or str(MAX_BYTES)
    if not value.isascii() or not value.isdigit():
        raise InvalidArgumentError(f"SCM_CACHE_MAX_BYTES must be a number of bytes, 0 for no cache, got {value!r}")
    return int(value)


def _platform_folder() -> Path:
    """Return the platform's folder for caches. Raises RuntimeError if there is no home folder."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "scm-runtime" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/scm-runtime"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "scm-runtime"  # the XDG specification ignores relative paths


def _unsafe_reason(path: Path, *, is_subfolder: bool) -> str | None:
    """Return why others could put files into a folder, or None if they cannot."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return "must be a folder"
    reason = unsafe_reason(found)
    # With the sticky bit, others can add to a folder, but cannot replace the user's subfolders in it.
    is_shared = not is_subfolder and bool(found.st_mode & stat.S_ISVTX) and found.st_uid in (0, os.geteuid())
    return None if is_shared else reason
