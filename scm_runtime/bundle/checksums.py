"""SHA-256 checksums of a bundle's files, their verification, and a cache of checksums, so that unchanged files are not read again to be hashed.

A cached checksum is stored with the file's path, size, inode, device and times of change (``mtime`` and ``ctime``, in nanoseconds). It is valid for a month
if all of them are unchanged. This detects what usually happens to files: an incomplete copy, a replacement, an editor, a sync. It does not detect bit
errors on the disk, or an attacker who can write to the cache or set the clock: the cache is in the user's cache folder, and an attacker who can write there
can replace the program as well.
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
from scm_runtime.common.documents import decode_json
from scm_runtime.common.files import open_regular, read_private, whole_file
from scm_runtime.errors import BundleIntegrityError

FINGERPRINT_PREFIX = "unread "
MAX_ENTRY_BYTES = 1 << 16
CHUNK_BYTES = 1 << 18
MAX_AGE_S = 30 * 24 * 3600
SETTLED_NS = 2_000_000_000  # two changes may have the same time on file systems with coarse clocks (FAT: 2 s): younger files are hashed every time


class FileStat(Struct, frozen=True):
    """Identity and state of a file when its checksum was computed."""

    path: str
    size: int
    inode: int
    device: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path, file: BufferedReader | None = None) -> FileStat:
        """Read the current state of a file; with ``file``, of that open file, even if the path has been replaced since. Raises OSError."""
        found = path.stat() if file is None else os.fstat(file.fileno())
        return cls(os.fspath(path.absolute()), found.st_size, found.st_ino, found.st_dev, found.st_mtime_ns, found.st_ctime_ns)


class CachedChecksum(Struct, frozen=True):
    """A file's checksum, and its state when it was computed."""

    seen: FileStat
    sha256: str


def sha256(path: Path, between_chunks: Callable[[], None] | None = None) -> str:
    """SHA-256 of a regular file, in hexadecimal. Raises OSError, and what ``between_chunks`` raises: it is called often while the file is read."""
    with open_regular(path) as file:
        return file_sha256(file, between_chunks)


def file_sha256(file: BufferedReader, between_chunks: Callable[[], None] | None = None) -> str:
    """SHA-256 of an open file, in hexadecimal. Arguments and errors are those of ``sha256``."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    while count := file.readinto(chunk):
        digest.update(chunk[:count])
        if between_chunks is not None:
            between_chunks()
    return digest.hexdigest()


def stat_fingerprint(path: Path, file: BufferedReader | None = None) -> str:
    """Return a fingerprint of a file's state, without reading the file. It changes with the file, and differs from every SHA-256. Raises OSError.

    It replaces the checksum if files are not verified. With ``file``, it is that of the open file: see ``FileStat.of``.
    """
    return FINGERPRINT_PREFIX + hashlib.sha256(msgspec.json.encode(FileStat.of(path, file))).hexdigest()


def is_stat_fingerprint(text: str) -> bool:
    """Return True for a result of ``stat_fingerprint``, False for a SHA-256."""
    return text.startswith(FINGERPRINT_PREFIX)


class ChecksumCache:
    """Checksums of files, cached in a folder with a small file for each. Safe to use from several threads and processes.

    Errors of reading and writing the cache are ignored: the checksum is then computed again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def sha256(self, path: Path, between_chunks: Callable[[], None] | None = None) -> str:
        """SHA-256 of a file, in hexadecimal, from the cache if the file is unchanged. Arguments and errors are those of the function ``sha256``."""
        with open_regular(path) as file:
            return self._sha256(path, file, between_chunks)

    def _sha256(self, path: Path, file: BufferedReader, between_chunks: Callable[[], None] | None) -> str:
        before = FileStat.of(path, file)  # of the open file, not of the path: else a file that replaces it would get its checksum
        try:
            entry = self._entry(before)
            is_recent = time.time() - entry.stat().st_mtime < MAX_AGE_S
            cached = msgspec.convert(decode_json(read_private(entry, MAX_ENTRY_BYTES)), CachedChecksum) if is_recent else None
        except (OSError, ValueError):
            cached = None
        if cached is not None and cached.seen == before:
            return cached.sha256
        settled = time.time_ns() - max(before.mtime_ns, before.ctime_ns) > SETTLED_NS
        digest = file_sha256(file, between_chunks)
        if settled and FileStat.of(path, file) == before:
            self._remember(before, digest)
        return digest

    def remember(self, path: Path, digest: str) -> None:
        """Store the checksum of a file that no other process writes to."""
        with suppress(OSError):  # it is computed again next time
            self._remember(FileStat.of(path), digest)

    def _remember(self, seen: FileStat, digest: str) -> None:
        with suppress(OSError), whole_file(self._entry(seen), mode=0o600) as part:
            part.write_bytes(msgspec.json.encode(CachedChecksum(seen, digest)))

    def prune(self) -> None:
        """Delete checksums that are older than a month."""
        try:
            for path in self._folder.iterdir():
                if time.time() - path.lstat().st_mtime > MAX_AGE_S:
                    path.unlink()
        except OSError:
            return  # another process is pruning, too

    def _entry(self, seen: FileStat) -> Path:
        return self._folder / f"{hashlib.sha256(os.fsencode(seen.path)).hexdigest()[:32]}.json"


def check_files(
    folder: Path, manifest: Manifest, names: Iterable[str] | None = None, *, hashes: bool = True, digest_of: Callable[[Path], str] | None = None
) -> None:
    """Compare a bundle's files with its manifest: all of them or those in ``names``, presence and size always, SHA-256 unless ``hashes`` is False.

    ``digest_of`` returns the SHA-256 of a file; by default it is computed.

    Raises:
        BundleIntegrityError: a file is missing, cannot be read, or differs from the manifest.
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
            raise BundleIntegrityError(f"cannot read '{path}': {error.strerror or error}. Expected a file that you may read.") from error
        if digest != entry.sha256:
            raise BundleIntegrityError(
                f"'{path}' must have SHA-256 {entry.sha256[:12]}…, got {digest[:12]}…. The file was changed or damaged: copy or export it again."
            )
