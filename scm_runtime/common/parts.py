"""Temporary files and folders beside their destinations, and the removal of those whose process was killed.

A process holds a lock on each part that it writes. The system releases the lock when the process ends, however it ends. Folders may be shared between machines,
and a lock on another machine may be invisible here; therefore the name of a part identifies the running system. Parts of others are removed by their age.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path

from scm_runtime.common.log import log

try:
    import fcntl
except ImportError:  # on Windows, parts are removed by their age
    fcntl = None  # type: ignore[assignment]  # a module or None

NAME = re.compile(r"\..+\.part-([0-9a-f]{8})-[0-9a-f]{12}", re.DOTALL)
MAX_AGE_S = 7 * 24 * 3600.0  # since the last write to a part of another system


@contextmanager
def locked_part(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a new hidden file or folder beside a destination, locked for this process. It is removed at the end, unless it was renamed. Raises OSError."""
    part, lock = _create(target, folder=folder)
    try:
        yield part
    finally:
        _remove(part)
        _close(lock)


def _create(target: Path, *, folder: bool) -> tuple[Path, int | None]:
    while True:
        part = target.with_name(f".{target.name[:50]}.part-{system_id()}-{os.urandom(6).hex()}")
        part.mkdir() if folder else part.touch(exist_ok=False)
        try:
            descriptor = _open(part)
        except FileNotFoundError:  # another process has swept it before it was opened
            continue
        held = _lock(descriptor)
        if held is not False and part.exists():  # else another process has swept it before it was locked
            return part, descriptor
        _close(descriptor)


def sweep(folder: Path) -> None:
    """Remove the parts in a folder whose processes were killed, and log each. Parts that cannot be read or removed stay."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if match := NAME.fullmatch(entry.name):
                _sweep_part(Path(entry.path), match[1])


@lru_cache(maxsize=1000)
def sweep_once(folder: str) -> None:
    """Sweep a folder, given by its absolute path, if this process has not done so: reading a large folder again for each file in it would be slow."""
    sweep(Path(folder))


@cache
def system_id() -> str:
    """Identify the running system: the boot of this machine, which all containers on it share, as they share its locks."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        import platform
        import uuid

        identity = f"{platform.node()} {uuid.getnode()}"
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def _sweep_part(part: Path, system: str) -> None:
    descriptor = None
    try:
        descriptor = _open(part)
        held = _lock(descriptor)
        if held is False or ((held is None or system != system_id()) and time.time() - _last_write(part) < MAX_AGE_S):
            return
        _remove(part)
        if not part.exists():
            log.info("removed '%s', which a process that was killed had left", part)
    except OSError:  # it is gone, another user's, or no part
        pass
    finally:
        _close(descriptor)


def _open(part: Path) -> int | None:
    """Open a part for locking it. Raises OSError."""
    if fcntl is None:
        return None
    # Network file systems lock only files that are open for writing.
    return os.open(part, (os.O_RDONLY if part.is_dir() else os.O_RDWR) | os.O_NOFOLLOW | os.O_NONBLOCK)


def _lock(descriptor: int | None) -> bool | None:
    """Lock a part. Returns False if another process holds the lock, None if there are no locks on this system or file system."""
    if descriptor is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _last_write(part: Path) -> float:
    """Time of the last write to a file, or to a folder and the files in it. Raises OSError."""
    times: list[float] = [path.lstat().st_mtime for path in (part, *(part.iterdir() if part.is_dir() else ()))]
    return max(times)


def _remove(part: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() and not part.is_symlink() else part.unlink(missing_ok=True)
