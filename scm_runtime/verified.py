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
from pathlib import Path

import msgspec
from msgspec import Struct

from scm_runtime.bundle import sha256
from scm_runtime.files import whole_file

KEPT_S = 30 * 24 * 3600
SETTLED_NS = 2_000_000_000  # two changes may bear one time on file systems with coarse clocks (FAT: 2 s): younger files are hashed every time


class Seen(Struct, frozen=True):
    """What a file was like when its sum was taken."""

    path: str
    size: int
    inode: int
    device: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> Seen:
        """As it is now. Raises OSError."""
        found = path.stat()
        return cls(os.fspath(path.absolute()), found.st_size, found.st_ino, found.st_dev, found.st_mtime_ns, found.st_ctime_ns)


class Sum(Struct, frozen=True):
    """One remembered sum."""

    seen: Seen
    sha256: str


def identity(path: Path) -> str:
    """What stands for a file's sum where it is not to be read: it changes when the file does, and no sum is like it. Raises OSError."""
    return "unread " + hashlib.sha256(msgspec.json.encode(Seen.of(path))).hexdigest()


class Verified:
    """The sums of one folder, a small file each. Safe to use from several threads and processes; a memory that cannot be read or written forgets."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file, in hexadecimal: remembered, or taken now. A drop-in for ``bundle.sha256``. Raises OSError where the file cannot be read."""
        before = Seen.of(path)
        try:
            place = self._place(before)
            known = msgspec.json.decode(place.read_bytes(), type=Sum) if time.time() - place.stat().st_mtime < KEPT_S else None
        except (OSError, msgspec.DecodeError):
            known = None
        if known is not None and known.seen == before:
            return known.sha256
        settled = time.time_ns() - max(before.mtime_ns, before.ctime_ns) > SETTLED_NS
        digest = sha256(path)
        if settled and Seen.of(path) == before:
            self.remember(path, digest)
        return digest

    def remember(self, path: Path, digest: str) -> None:
        """Keep the sum of a file that nobody else writes to."""
        try:
            seen = Seen.of(path)
            with whole_file(self._place(seen)) as part:
                part.write_bytes(msgspec.json.encode(Sum(seen, digest)))
        except OSError:
            return  # it is hashed again next time

    def prune(self) -> None:
        """Forget the sums that have had their month."""
        try:
            for path in self._folder.iterdir():
                if time.time() - path.lstat().st_mtime > KEPT_S:
                    path.unlink()
        except OSError:
            return  # another process does the same

    def _place(self, seen: Seen) -> Path:
        return self._folder / f"{hashlib.sha256(os.fsencode(seen.path)).hexdigest()[:32]}.json"
