"""A folder of graphs as ONNX Runtime optimised them, so that opening one again skips the optimisation: it is most of the time that opening takes.

An entry is a folder named by its key, with ``graph.onnx``, the weights as the graph has them now, ``graph.data``, and ``entry.json``. ONNX Runtime maps the
weights instead of copying them, so that processes on one machine share them. Sessions out of the cache compute the same bits as those that made it.

An entry is made of a private copy of the graph and its weights, hashed while it is made: see private_copy.py.

The cache never stands in the way: what is damaged is made anew, what cannot be written is left out, with a line in the log and no error.
It is the user's own folder, closed to others (0700). Whoever can write to it can change what a model computes, as with the installed package.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from scm_runtime.bundle.checksums import ChecksumCache, sha256
from scm_runtime.cache.folder import MAX_BYTES, log_once, usable_folder
from scm_runtime.cache.folder import max_bytes as default_bytes
from scm_runtime.cache.private_copy import ChangedError, NoRoomError, copy_graph
from scm_runtime.common.files import open_regular
from scm_runtime.common.load_onnxruntime import load_onnxruntime

Opened = TypeVar("Opened")
Change = Callable[[Any], None]
"""What an opening adds to its ``onnxruntime.SessionOptions``, after all else that is set there."""

SPARE, SPARE_MAX = 20, 4 << 30  # a twentieth of the disk stays free, or 4 GiB of a large one
UNUSED_LIFE_S = 90 * 24 * 3600  # what an older ONNX Runtime left is never used again
GRAPH, DATA, ENTRY = "graph.onnx", "graph.data", "entry.json"
COMPILED = "compiled nodes"  # what TensorRT, OpenVINO and CoreML make of parts of a graph cannot be saved, says ONNX Runtime
PARTS = (GRAPHS, SUMS) = ("graphs", "verified")
PART = ".part-"
PART_LIFE_S = 3600  # no graph takes that long to write: whoever wrote it was killed
REFUSAL_LIFE_S = 7 * 24 * 3600

_log = logging.getLogger("scm_runtime")


class CachedFile(Struct, frozen=True):
    """One file of an entry."""

    size: int
    sha256: str


class Entry(Struct, frozen=True, kw_only=True):
    """``entry.json``. No files and a reason: the graph cannot be cached, and need not be tried again for a while."""

    source: str
    files: dict[Literal["graph.onnx", "graph.data"], CachedFile] = {}
    refused: str | None = None


class GraphCache:
    """Cached graphs in one folder. Safe to use from several threads and processes."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        """A cache in a folder that exists and is the user's own; ``GraphCache.find`` sees to that."""
        self.folder, self.max_bytes = folder / GRAPHS, max_bytes
        self.verified = ChecksumCache(folder / SUMS)

    @classmethod
    def find(cls, folder: str | os.PathLike[str] | Literal[False] | None = None, max_bytes: int | None = None) -> GraphCache | None:
        """The cache to use; None where there is to be none, or where its folder cannot be used, which the log says.

        Args:
            folder: False for none; None for the one that SCM_CACHE_DIR names (set and empty: none), else the platform's folder for caches.
            max_bytes: for all entries together; what was not used for longest goes first. None: SCM_CACHE_MAX_BYTES, or 4 GiB. 0 keeps none.

        Raises:
            InvalidArgumentError: SCM_CACHE_MAX_BYTES is no number of bytes.
        """
        if folder is False:
            return None
        limit = default_bytes() if max_bytes is None else max_bytes
        root = usable_folder(folder, PARTS) if limit > 0 else None
        return cls(root, limit) if root else None

    def open(self, source: Path, key: str, build: Callable[[Path, Change], Opened], *, sums: Mapping[str, str], verify: bool = True) -> Opened:
        """Open a graph out of the cache where it is there; else open it as it stands and put it there.

        Args:
            source: the ``.onnx`` file. What is put into the cache is made of a private copy of it, of exactly the bytes that have those sums.
            key: of ``key.graph_key``.
            build: opens the graph at a path with new SessionOptions, which it gives to the change last of all. It is called up to three
                times; what it returns from a call before the last is dropped.
            sums: of the graph and the weights, by name, as ``copy_graph`` takes them: those that the key was made with.
            verify: compare the SHA-256 of cached files with what was written; False: their sizes alone.

        Returns:
            What ``build`` returned.

        Raises:
            Whatever ``build`` raises for the source itself.
        """
        path = self.folder / key
        entry, failure, refusal = self._read(path, verify), None, None
        if entry is None:
            failure = self._fill(path, source, build, sums)
            entry = self._read(path, verify=False)
        if entry is not None and entry.refused is None:
            try:
                opened = build(path / GRAPH, _as_it_is)
            except Exception as error:  # noqa: BLE001  # ONNX Runtime's exceptions have no common base
                if self._read(path, verify) is not None:  # else another process removed it meanwhile
                    refusal = f"cannot be opened again: {error}"
            else:
                _touch(path / ENTRY)
                return opened
        opened = build(source, _unchanged)  # raises where the failure is not the cache's, and then it is not the cache's to tell
        if failure is not None and COMPILED in str(failure):
            refusal = f"cannot be saved: {failure}"
        elif isinstance(failure, ChangedError):
            _log.warning("nothing is cached of a graph: %s", failure)
        elif failure is not None and not isinstance(failure, NoRoomError):  # a full disk, a read-only folder: that may change
            log_once("optimised graphs are not cached", failure)
        if refusal is not None:
            self._refuse(path, source, refusal)
        return opened

    def clear(self) -> None:
        """Remove every entry."""
        for _, _, path in self._entries():
            self._remove(path)

    def _fill(self, path: Path, source: Path, build: Callable[[Path, Change], object], sums: Mapping[str, str]) -> Exception | None:
        """Make an entry; or say why that failed."""
        part, copies = self._part(), self._part()
        try:
            for folder in (part, copies):
                folder.mkdir(mode=0o700)
            # The session is dropped: it holds copies of the weights that one from the entry maps.
            build(copy_graph(source, copies, sums, self._has_room), _saving(part))
            self._publish(part, path, source)
        except Exception as error:  # noqa: BLE001  # as above
            return error
        finally:
            for folder in (part, copies):
                shutil.rmtree(folder, ignore_errors=True)
        return None

    def _publish(self, part: Path, path: Path, source: Path) -> None:
        """Move what was saved to its place. Raises OSError."""
        files: dict[Literal["graph.onnx", "graph.data"], CachedFile] = {}
        for name in (GRAPH, DATA):
            if (part / name).exists() or name == GRAPH:
                _sync(part / name)
                files[name] = CachedFile((part / name).stat().st_size, sha256(part / name))  # type: ignore[index]  # a Literal's values
        size = sum(file.size for file in files.values())
        if size > self.max_bytes:
            self._refuse(path, source, f"takes {size} bytes, the cache {self.max_bytes}")
            return
        (part / ENTRY).write_bytes(msgspec.json.encode(Entry(source=source.name, files=files)))
        _sync(part / ENTRY)
        try:
            part.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):  # another process was first; EACCES is how Windows says so
                return
            raise
        for name, file in files.items():
            self.verified.remember(path / name, file.sha256)
        self.verified.prune()
        self._evict()

    def _read(self, path: Path, verify: bool) -> Entry | None:
        """A whole entry, or None; what is not whole is discarded."""
        try:
            return self._check(path, verify)
        except FileNotFoundError as error:
            if os.path.lexists(path):
                self._discard(path, str(error))
        except (OSError, msgspec.DecodeError) as error:
            self._discard(path, str(error))
        return None

    def _check(self, path: Path, verify: bool) -> Entry | None:
        """An entry; None if it is a refusal that has had its time. Raises OSError, DecodeError: it is not whole."""
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise OSError("it is no folder")
        entry = msgspec.json.decode(_own_bytes(path / ENTRY), type=Entry)
        if entry.refused is not None:
            if time.time() - (path / ENTRY).stat().st_mtime < REFUSAL_LIFE_S:
                return entry
            self._remove(path)
            return None
        if GRAPH not in entry.files:
            raise OSError(f"{ENTRY} lacks {GRAPH}")
        for name, file in entry.files.items():
            found = (path / name).lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_size != file.size:
                raise OSError(f"{name} must be a file of {file.size} bytes")
            if verify and self.verified.sha256(path / name) != file.sha256:
                raise OSError(f"{name} was changed")
        return entry

    def _refuse(self, path: Path, source: Path, reason: str) -> None:
        _log.info("'%s' is not cached, and that is not tried again for a week: it %s", source, reason)
        part = self._part()
        try:
            self._remove(path)
            part.mkdir(mode=0o700)
            (part / ENTRY).write_bytes(msgspec.json.encode(Entry(source=source.name, refused=reason)))
            part.rename(path)
        except OSError:
            shutil.rmtree(part, ignore_errors=True)

    def _discard(self, path: Path, reason: str) -> None:
        _log.warning("the cached graph '%s' is not used and made anew: %s", path, reason)
        self._remove(path)

    def _remove(self, path: Path) -> None:
        """Take an entry away at once, then delete it: nobody sees half of it, and sessions that map its files keep them."""
        part = self._part()
        try:
            path.rename(part)
            if part.is_symlink() or not part.is_dir():
                part.unlink()
        except OSError:
            return  # gone already, or open on Windows
        shutil.rmtree(part, ignore_errors=True)

    def _part(self) -> Path:
        return self.folder / f"{PART}{os.urandom(8).hex()}"

    def _evict(self) -> None:
        """Remove what was unused for longest until the rest fits. Raises OSError."""
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        for used, size, path in entries:
            if total <= self.max_bytes and time.time() - used < UNUSED_LIFE_S:
                break
            self._remove(path)
            total -= size

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """Of each: when it was last used, its size in bytes, its folder."""
        for path in self.folder.iterdir():
            try:
                if path.name.startswith(PART):
                    if time.time() - path.lstat().st_mtime > PART_LIFE_S:
                        shutil.rmtree(path)
                    continue
                yield (path / ENTRY).stat().st_mtime, sum(file.lstat().st_size for file in path.iterdir()), path
            except OSError:
                continue  # removed by another process

    def _has_room(self, size: int) -> bool:
        """Whether the disk keeps its spare part beside so many bytes. Raises OSError."""
        disk = shutil.disk_usage(self.folder)
        return disk.free - size > min(disk.total // SPARE, SPARE_MAX)


def _unchanged(options: Any) -> None:
    """Open as it stands."""


def _as_it_is(options: Any) -> None:
    options.graph_optimization_level = load_onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL


def _saving(folder: Path) -> Change:
    def change(options: Any) -> None:
        options.optimized_model_filepath = os.fspath(folder / GRAPH)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", DATA)

    return change


def _own_bytes(path: Path) -> bytes:
    """A small file's bytes, if it is one, and no link or pipe. Raises OSError."""
    with open_regular(path, follow_links=False) as file:
        return file.read()


def _sync(path: Path) -> None:
    """Bring a file to the disk: a rename that outlives a crash must not show one that did not. Raises OSError."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _touch(path: Path) -> None:
    """Note a use."""
    try:
        os.utime(path)
    except OSError:
        return  # removed by another process, or the folder is read-only by now
