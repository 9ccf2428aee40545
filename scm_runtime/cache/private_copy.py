"""Copies of a graph and its weights that nobody else can write to, made of exactly the bytes whose sums are known.

Between the check of a bundle's files and their opening by ONNX Runtime, whoever can write to the bundle could swap them, and swap them back before they
are looked at again. What is kept for later under the name of those sums is therefore made from such copies.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from scm_runtime.bundle import hub
from scm_runtime.bundle.checksums import is_stat_fingerprint, stat_fingerprint
from scm_runtime.bundle.manifest import WEIGHTS
from scm_runtime.common.files import open_regular

CHUNK = 1 << 20


class ChangedError(OSError):
    """A file is not the one whose sum was taken."""


class NoRoomError(OSError):
    """The disk would be too full."""


def copy_graph(source: Path, folder: Path, sums: Mapping[str, str], has_room: Callable[[int], bool]) -> Path:
    """Copy a graph into a private folder, and the weights beside it if it mentions them.

    Args:
        source: the ``.onnx`` file.
        folder: an empty one that others cannot write to.
        sums: by name, of the graph and the weights: SHA-256, or ``checksums.stat_fingerprint`` where they were not read.
        has_room: whether the disk has room for so many bytes.

    Returns:
        The graph's copy.

    Raises:
        ChangedError: a file is another than the one with that sum.
        NoRoomError: ``has_room`` says so, of the copies and a graph with twice the size of the weights, as half precision has when it is unpacked.
        OSError: a file cannot be read or written.
    """
    graph, weights = folder / source.name, source.with_name(WEIGHTS)
    _copy(source, graph, sums[source.name], lambda size: has_room(2 * size))
    if _mentions(graph, WEIGHTS):
        # ONNX Runtime follows no link out of the folder either, and for the same reason: see hub.blob.
        _copy(weights, folder / WEIGHTS, sums[WEIGHTS], lambda size: has_room(3 * size), link_to=hub.blob(weights), follow_links=False)
    return graph


def _copy(source: Path, target: Path, expected: str, has_room: Callable[[int], bool], *, link_to: Path | None = None, follow_links: bool = True) -> None:
    """Copy a file, hashing the very bytes that are written."""
    with open_regular(link_to or source, follow_links=follow_links) as file:
        size = os.fstat(file.fileno()).st_size
        if not has_room(size):
            raise NoRoomError(f"there is no room for a copy of '{source}'")
        digest, left, before = hashlib.sha256(), size, stat_fingerprint(source, file)
        with target.open("xb") as copy:
            while left and (chunk := file.read(min(left, CHUNK))):
                digest.update(chunk)
                copy.write(chunk)
                left -= len(chunk)
        found = {digest.hexdigest()} if not is_stat_fingerprint(expected) else {before, stat_fingerprint(source, file)}
    if found != {expected}:
        raise ChangedError(f"'{source}' was changed while the bundle was opened")


def _mentions(graph: Path, name: str) -> bool:
    with graph.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return False  # an empty file cannot be mapped
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            return contents.find(name.encode()) >= 0
