"""A memory of SHA-256 sums, so that a file which did not change since it was last read is not read again only to be hashed.

A sum is remembered with the file's path, size, inode, device and the times of its last change (``mtime`` and ``ctime``, in nanoseconds), and counts only
while all of them are the same, for a month. This finds what happens to files: a copy that broke off, another version in their place, an editor, a sync.
It does not find bits that turn on the disk without a write, nor an attacker who can write to this memory or set the clock: it lies in the user's own
cache, and whoever can write there can replace the program as well.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

import msgspec
from msgspec import Struct

from scm_runtime.bundle.manifest import Manifest
from scm_runtime.common.files import open_regular, whole_file
from scm_runtime.errors import BundleIntegrityError

UNREAD = "unread "
KEPT_S = 30 * 24 * 3600
SETTLED_NS = 2_000_000_000  # two changes may bear one time on file systems with coarse clocks (FAT: 2 s): younger files are hashed every time


class FileStat(Struct, frozen=True):
    """What a file was like when its sum was taken."""

    path: str
    size: int
    inode: int
    device: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path, file: BufferedReader | None = None) -> FileStat:
        """As it is now; with ``file``, as the one that was opened at that path is now, whatever lies at the path by then. Raises OSError."""
        found = path.stat() if file is None else os.fstat(file.fileno())
        return cls(os.fspath(path.absolute()), found.st_size, found.st_ino, found.st_dev, found.st_mtime_ns, found.st_ctime_ns)


class CachedChecksum(Struct, frozen=True):
    """One remembered sum."""

    seen: FileStat
    sha256: str


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return file_sha256(file)


def file_sha256(file: BufferedReader) -> str:
    """SHA-256 of an open file, in hexadecimal. Raises OSError."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def stat_fingerprint(path: Path, file: BufferedReader | None = None) -> str:
    """What stands for a file's sum where it is not to be read: it changes when the file does, and no sum is like it. See ``FileStat.of``. Raises OSError."""
    return UNREAD + hashlib.sha256(msgspec.json.encode(FileStat.of(path, file))).hexdigest()


def is_stat_fingerprint(text: str) -> bool:
    """Whether this is an ``stat_fingerprint``, and no SHA-256."""
    return text.startswith(UNREAD)


class ChecksumCache:
    """The sums of one folder, a small file each. Safe to use from several threads and processes; a memory that cannot be read or written forgets."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file, in hexadecimal: remembered, or taken now. A drop-in for ``sha256``. Raises OSError where the file cannot be read."""
        with open_regular(path) as file:
            return self._sha256(path, file)

    def _sha256(self, path: Path, file: BufferedReader) -> str:
        before = FileStat.of(path, file)  # not of the path: a file that is swapped for it, while its folder is another, would get its sum
        try:
            place = self._place(before)
            known = msgspec.json.decode(place.read_bytes(), type=CachedChecksum) if time.time() - place.stat().st_mtime < KEPT_S else None
        except (OSError, msgspec.DecodeError):
            known = None
        if known is not None and known.seen == before:
            return known.sha256
        settled = time.time_ns() - max(before.mtime_ns, before.ctime_ns) > SETTLED_NS
        digest = file_sha256(file)
        if settled and FileStat.of(path, file) == before:
            self._remember(before, digest)
        return digest

    def remember(self, path: Path, digest: str) -> None:
        """Keep the sum of a file that nobody else writes to."""
        with suppress(OSError):  # it is hashed again next time
            self._remember(FileStat.of(path), digest)

    def _remember(self, seen: FileStat, digest: str) -> None:
        with suppress(OSError), whole_file(self._place(seen)) as part:
            part.write_bytes(msgspec.json.encode(CachedChecksum(seen, digest)))

    def prune(self) -> None:
        """Forget the sums that have had their month."""
        try:
            for path in self._folder.iterdir():
                if time.time() - path.lstat().st_mtime > KEPT_S:
                    path.unlink()
        except OSError:
            return  # another process does the same

    def _place(self, seen: FileStat) -> Path:
        return self._folder / f"{hashlib.sha256(os.fsencode(seen.path)).hexdigest()[:32]}.json"


def check_files(
    folder: Path, manifest: Manifest, names: Iterable[str] | None = None, *, hashes: bool = True, digest_of: Callable[[Path], str] | None = None
) -> None:
    """Compare files of a bundle, all or those named, with its manifest: presence and size always, SHA-256 unless ``hashes`` is False.

    ``digest_of`` takes the sum of a file, or remembers it; by default it is taken.

    Raises:
        BundleIntegrityError: a file is missing, cannot be read, or differs.
    """
    for name in manifest.files if names is None else names:
        entry, path = manifest.files[name], folder / name
        if not path.is_file():
            raise BundleIntegrityError(f"'{folder}' lacks the file {name}, which its manifest lists. Copy the whole folder or export again.")
        size = path.stat().st_size
        if size != entry.size:
            raise BundleIntegrityError(f"'{path}' must have {entry.size} bytes, got {size}. Copy the whole folder again or export again.")
        try:
            digest = (digest_of or sha256)(path) if hashes else entry.sha256
        except OSError as error:
            raise BundleIntegrityError(f"cannot read '{path}': {error.strerror}. Expected a file that you may read.") from error
        if digest != entry.sha256:
            raise BundleIntegrityError(
                f"'{path}' must have SHA-256 {entry.sha256[:12]}…, got {digest[:12]}…. The file was changed or damaged: copy or export it again."
            )
