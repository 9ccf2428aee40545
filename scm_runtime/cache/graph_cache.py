"""A folder of graphs as ONNX Runtime optimized them: opening one skips the optimization, which takes most of the time of opening a graph.

An entry is a folder, named by its key, with the graph (``graph.onnx``), its weights as the optimized graph has them (``graph.data``) and a description
(``entry.json``). ONNX Runtime maps the weights into memory, so processes share them. A session over a cached graph computes the same bits as the session
that saved it.

A graph is saved from a private copy of the bundle's files, which is hashed while it is written: see private_copy.py.

The cache never causes an error: an entry that is damaged or that another user could have written is rebuilt, and what cannot be written is logged and left
out. The folder belongs to the user and is closed to other users (0700). Anyone who can write to it can change what a model computes, as with the installed
package. The cache does not depend on sessions: ``ort.open_session`` decides what to look up and what to add.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct, field

from scm_runtime.bundle.checksums import ChecksumCache, sha256
from scm_runtime.cache.folder import max_bytes, usable_folder
from scm_runtime.cache.private_copy import copy_graph
from scm_runtime.common.documents import decode_json
from scm_runtime.common.files import read_private, unsafe_reason
from scm_runtime.common.log import log

MIN_FREE_FRACTION, MIN_FREE_BYTES = 1 / 20, 4 << 30  # of the disk, which stay free: the smaller of the two
ENTRY_LIFE_S = 90 * 24 * 3600  # an older version of ONNX Runtime leaves entries that no other uses
UNCACHEABLE_LIFE_S = 7 * 24 * 3600
TEMP_LIFE_S = 3600  # writing a graph takes less: the process that made an older one was killed
GRAPH, DATA, ENTRY = "graph.onnx", "graph.data", "entry.json"
SUBFOLDERS = (GRAPHS, CHECKSUMS) = ("graphs", "verified")
TEMP_PREFIX = ".part-"
MAX_ENTRY_BYTES = 1 << 16


class CachedFile(Struct, frozen=True):
    """Size and checksum of one file of an entry."""

    size: int
    sha256: str


class Entry(Struct, frozen=True, kw_only=True):
    """The contents of ``entry.json``: the files of a cached graph, or the reason why the graph cannot be cached."""

    source: str
    files: dict[Literal["graph.onnx", "graph.data"], CachedFile] = {}
    uncacheable_reason: str | None = field(default=None, name="refused")
    """Why the graph cannot be cached. For a week nothing tries again."""


class GraphCache:
    """Cached graphs in one folder. Several threads and processes may use it at once."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Use a folder that exists and belongs to the user; ``GraphCache.locate`` checks that."""
        self.folder, self.max_bytes = folder / GRAPHS, max_bytes
        self.checksums = ChecksumCache(folder / CHECKSUMS)

    @classmethod
    def locate(cls, folder: str | os.PathLike[str] | Literal[False] | None = None) -> GraphCache | None:
        """Return the cache to use, or None if there is none or its folder is unusable, which is logged.

        All entries together take at most SCM_CACHE_MAX_BYTES, 4 GiB by default; the least recently used are removed. 0 turns the cache off.

        Args:
            folder: False for no cache; None for the folder in SCM_CACHE_DIR (no cache if it is set and empty) or the platform's folder for caches.

        Raises:
            InvalidArgumentError: SCM_CACHE_MAX_BYTES is not a number of bytes.
        """
        if folder is False:
            return None
        limit = max_bytes()
        root = usable_folder(folder, SUBFOLDERS) if limit > 0 else None
        if root is None:
            return None
        cache = cls(root, limit)
        cache._remove_abandoned()
        return cache

    def find(self, key: str, *, verify: bool = True) -> Path | None:
        """Return the optimized graph of a key, or None. A damaged entry is removed.

        Args:
            key: from ``key.graph_key``.
            verify: compare the SHA-256 of the files with those in the entry; False compares only their sizes.
        """
        entry = self._read(key, verify)
        return None if entry is None or entry.uncacheable_reason is not None else self.folder / key / GRAPH

    def is_uncacheable(self, key: str) -> bool:
        """Return True if the graph of this key could not be cached less than a week ago."""
        entry = self._read(key, verify=False)
        return entry is not None and entry.uncacheable_reason is not None

    def add(self, key: str, source: Path, checksums: Mapping[str, str], save: Callable[[Path, Path], object]) -> Path | None:
        """Save a graph, and return the optimized one.

        Args:
            key: from ``key.graph_key``.
            source: the bundle's ``.onnx`` file. A private copy is made of it and its weights, with exactly the bytes that have those checksums.
            checksums: of the graph and its weights by name, as ``copy_graph`` takes them and the key was made with.
            save: optimizes the graph at the first path and writes it into the folder at the second.

        Returns:
            The optimized graph, or None if it is too large for the cache.

        Raises:
            ChangedError: the files changed since their checksums were taken.
            NoRoomError: the disk would be too full.
            OSError: the folder cannot be written to.
            Exception: whatever ``save`` raises.
        """
        temporary, copies = self._temporary(), self._temporary()
        try:
            for folder in (temporary, copies):
                folder.mkdir(mode=0o700)
            save(copy_graph(source, copies, checksums, self._has_room), temporary)
            self._publish(key, temporary, source)
        finally:
            for folder in (temporary, copies):
                shutil.rmtree(folder, ignore_errors=True)
        return self.find(key, verify=False)

    def mark_used(self, key: str) -> None:
        """Note that an entry was used now, so that others are removed first."""
        with suppress(OSError):  # another process removed it, or the folder has become read-only
            os.utime(self.folder / key / ENTRY)

    def mark_uncacheable(self, key: str, source: Path, reason: str) -> None:
        """Note that a graph cannot be cached, in place of its entry. ``reason`` continues a sentence: "cannot be saved: …"."""
        log.info("'%s' is not cached, and that is not tried again for a week: it %s", source, reason)
        temporary, path = self._temporary(), self.folder / key
        try:
            self._remove(path)
            temporary.mkdir(mode=0o700)
            _write_entry(temporary, Entry(source=source.name, uncacheable_reason=reason[:1000]))
            temporary.rename(path)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)

    def _publish(self, key: str, temporary: Path, source: Path) -> None:
        """Move a saved graph to its place in the cache. Raises OSError."""
        path = self.folder / key
        files: dict[Literal["graph.onnx", "graph.data"], CachedFile] = {}
        for name in (GRAPH, DATA):
            if (temporary / name).exists() or name == GRAPH:
                (temporary / name).chmod(0o600)
                _sync(temporary / name)
                files[name] = CachedFile((temporary / name).stat().st_size, sha256(temporary / name))  # type: ignore[index]  # a Literal's values
        size = sum(file.size for file in files.values())
        if size > self.max_bytes:
            self.mark_uncacheable(key, source, f"takes {size} bytes, the cache {self.max_bytes}")
            return
        _write_entry(temporary, Entry(source=source.name, files=files))
        _sync(temporary / ENTRY)
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):  # another process was faster; Windows reports EACCES
                return
            raise
        for name, file in files.items():
            self.checksums.remember(path / name, file.sha256)
        self.checksums.prune()
        self._remove_abandoned()
        self._evict()

    def _read(self, key: str, verify: bool) -> Entry | None:
        """Return an intact entry, or None. A damaged one is removed."""
        path = self.folder / key
        try:
            return self._check(path, verify)
        except FileNotFoundError as error:
            if os.path.lexists(path):
                self._discard(path, str(error))
        except (OSError, ValueError) as error:
            self._discard(path, str(error))
        return None

    def _check(self, path: Path, verify: bool) -> Entry | None:
        """Return an entry, or None if it is an expired refusal. Raises OSError and ValueError if it is damaged, or another user could have written it."""
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise OSError("it is not a folder")
        if reason := unsafe_reason(found):
            raise OSError(f"it {reason}")
        entry = msgspec.convert(decode_json(read_private(path / ENTRY, MAX_ENTRY_BYTES)), Entry)
        if entry.uncacheable_reason is not None:
            if time.time() - (path / ENTRY).stat().st_mtime < UNCACHEABLE_LIFE_S:
                return entry
            self._remove(path)
            return None
        if GRAPH not in entry.files:
            raise OSError(f"{ENTRY} lacks {GRAPH}")
        for name, file_info in entry.files.items():
            found = (path / name).lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_size != file_info.size:
                raise OSError(f"{name} must be a file of {file_info.size} bytes")
            if reason := unsafe_reason(found):
                raise OSError(f"{name} {reason}")
            if verify and self.checksums.sha256(path / name) != file_info.sha256:
                raise OSError(f"{name} was changed")
        return entry

    def _discard(self, path: Path, reason: str) -> None:
        log.warning("the cached graph '%s' cannot be used and is rebuilt: %s", path, reason)
        self._remove(path)

    def _remove(self, path: Path) -> None:
        """Move an entry out of the way, then delete it: other processes never see half of it, and sessions keep the files that they map."""
        temporary = self._temporary()
        try:
            path.rename(temporary)
            if temporary.is_symlink() or not temporary.is_dir():
                temporary.unlink()
        except OSError:
            return  # already removed, or open on Windows
        shutil.rmtree(temporary, ignore_errors=True)

    def _temporary(self) -> Path:
        return self.folder / f"{TEMP_PREFIX}{os.urandom(8).hex()}"

    def _evict(self) -> None:
        """Remove expired entries, and the least recently used until the rest fits. Raises OSError."""
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        for used, size, path in entries:
            if total <= self.max_bytes and time.time() - used < ENTRY_LIFE_S:
                break
            self._remove(path)
            total -= size

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """Yield the time of last use, the size in bytes and the folder of each entry."""
        for path in self.folder.iterdir():
            if path.name.startswith(TEMP_PREFIX):
                continue
            try:
                yield (path / ENTRY).stat().st_mtime, sum(file.lstat().st_size for file in path.iterdir()), path
            except OSError:
                continue  # another process removed it

    def _remove_abandoned(self) -> None:
        """Remove what killed processes left."""
        with suppress(OSError):  # another process removes it, too
            for path in self.folder.glob(f"{TEMP_PREFIX}*"):
                if time.time() - path.lstat().st_mtime > TEMP_LIFE_S:
                    shutil.rmtree(path, ignore_errors=True)

    def _has_room(self, size: int) -> bool:
        """Return True if enough of the disk stays free after writing so many bytes. Raises OSError."""
        disk = shutil.disk_usage(self.folder)
        return disk.free - size > min(disk.total * MIN_FREE_FRACTION, MIN_FREE_BYTES)


def _write_entry(folder: Path, entry: Entry) -> None:
    """Write ``entry.json``, which only the user may change, whatever the umask is. Raises OSError."""
    (folder / ENTRY).write_bytes(msgspec.json.encode(entry))
    (folder / ENTRY).chmod(0o600)


def _sync(path: Path) -> None:
    """Flush a file to the disk: after a crash, the renamed folder must not hold a file without its contents. Raises OSError."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
