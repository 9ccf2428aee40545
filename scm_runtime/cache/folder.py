"""Where cached graphs lie, how much of the disk they may take, and whether nobody else can write there."""

from __future__ import annotations

import logging
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from scm_runtime.errors import InvalidArgumentError

MAX_BYTES = 4 << 30

_log = logging.getLogger("scm_runtime")
_said: set[str] = set()


def usable_folder(folder: str | os.PathLike[str] | Literal[False] | None, parts: Sequence[str]) -> Path | None:
    """The folder of the cache, made if need be; None where there is to be none, or where it cannot be used, which the log says. See ``look_for_folder``."""
    root, reason = look_for_folder(folder, parts)
    if reason:
        # Where nobody asked for a cache, its lack is no cause for concern.
        level = logging.INFO if folder is None and "SCM_CACHE_DIR" not in os.environ else logging.WARNING
        log_once("no cache of optimised graphs", reason, level)
    return root


def look_for_folder(folder: str | os.PathLike[str] | Literal[False] | None, parts: Sequence[str]) -> tuple[Path | None, str | None]:
    """The folder of the cache, made if need be, or why it cannot be used and what to do; neither where there is to be none.

    Args:
        folder: False for none; None for the one that SCM_CACHE_DIR names (set and empty: none), else the platform's.
        parts: folders within it, which are closed to others.

    Raises:
        InvalidArgumentError: ``folder`` names none.
    """
    named = os.environ.get("SCM_CACHE_DIR") if folder is None else folder
    if named is False or named == "":
        return None, None
    if named is not None and not isinstance(named, str | os.PathLike):
        raise InvalidArgumentError(f"cache_dir must be a folder, False for no cache, or None, got {named!r}")
    try:
        root = (_platform_folder() if named is None else Path(named).expanduser()).resolve()
        for path in (root, *(root / part for part in parts)):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if why := _unsafe(path, within=path != root):
                raise OSError(f"'{path}' {why}")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: there is no home folder; ValueError: a null character
        remedy = "Name a folder of your own in SCM_CACHE_DIR, one that is not there yet, say, in a folder that all share; or do without: SCM_CACHE_DIR=''"
        return None, f"{error}. {remedy}"
    return root, None


def max_bytes() -> int:
    """What SCM_CACHE_MAX_BYTES says, or 4 GiB. Raises InvalidArgumentError."""
    value = os.environ.get("SCM_CACHE_MAX_BYTES") or str(MAX_BYTES)
    if not value.isascii() or not value.isdigit():
        raise InvalidArgumentError(f"SCM_CACHE_MAX_BYTES must be a number of bytes, 0 for no cache, got {value!r}")
    return int(value)


def _platform_folder() -> Path:
    """Where this system's programs keep what can be made again. Raises RuntimeError: there is no home folder."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "scm-runtime" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/scm-runtime"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "scm-runtime"  # the XDG specification has relative paths ignored


def _unsafe(path: Path, *, within: bool) -> str | None:
    """Why others could put files into a folder; None where they cannot."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return "must be a folder"
    if sys.platform == "win32":
        return None  # its folder for caches is the user's own by its access list
    if found.st_uid not in (0, os.geteuid()):  # root could change the program as well; so does an image's builder who fills the cache
        return f"must belong to the user {os.geteuid()}, and belongs to {found.st_uid}"
    forbidden = 0o022 if within else 0 if found.st_mode & stat.S_ISVTX else stat.S_IWOTH
    if found.st_mode & forbidden:
        return f"must be closed to others, and has the mode {stat.S_IMODE(found.st_mode):o}"
    return None


def log_once(what: str, why: object, level: int = logging.WARNING) -> None:
    """What a process says once, whatever the reason the next time."""
    if what not in _said:
        _said.add(what)
        _log.log(level, "%s: %s", what, why)
