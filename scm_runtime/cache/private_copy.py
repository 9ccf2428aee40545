"""Private copies of a graph and its weights, made of exactly the bytes whose checksums are known.

Between the verification of a bundle's files and their opening by ONNX Runtime, anyone who can write to the bundle could replace a file and restore it
before it is verified again. A graph that is cached under the checksums of those files is therefore saved from copies that nobody else can write to.
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

CHUNK_BYTES = 1 << 20


class ChangedError(OSError):
    """A file changed since its checksum was taken."""


class NoRoomError(OSError):
    """The disk would be too full."""


def copy_graph(source: Path, folder: Path, checksums: Mapping[str, str], has_room: Callable[[int], bool]) -> Path:
    """Copy a graph into a private folder, with the weights beside it if it refers to them.

    Args:
        source: the ``.onnx`` file.
        folder: an empty folder that others cannot write to.
        checksums: of the graph and the weights by name: SHA-256, or ``checksums.stat_fingerprint`` if the files were not read.
        has_room: returns True if the disk has room for so many bytes.

    Returns:
        The copy of the graph.

    Raises:
        ChangedError: a file does not have its checksum.
        NoRoomError: there is no room for the copies and the optimized graph. It may have twice the size of the weights: half precision is unpacked.
        OSError: a file cannot be read or written.
    """
    graph, weights = folder / source.name, source.with_name(WEIGHTS)
    _copy(source, graph, checksums[source.name], lambda size: has_room(2 * size))
    if _contains(graph, WEIGHTS):
        # Like ONNX Runtime, follow no link out of the bundle's folder but huggingface_hub's: see hub.blob.
        _copy(weights, folder / WEIGHTS, checksums[WEIGHTS], lambda size: has_room(3 * size), link_to=hub.blob(weights), follow_links=False)
    return graph


def _copy(source: Path, target: Path, expected: str, has_room: Callable[[int], bool], *, link_to: Path | None = None, follow_links: bool = True) -> None:
    """Copy a file, and hash the bytes that are written."""
    with open_regular(link_to or source, follow_links=follow_links) as file:
        size = os.fstat(file.fileno()).st_size
        if not has_room(size):
            raise NoRoomError(f"there is no room for a copy of '{source}'")
        digest, left, before = hashlib.sha256(), size, stat_fingerprint(source, file)
        with target.open("xb") as copy:
            while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                digest.update(chunk)
                copy.write(chunk)
                left -= len(chunk)
        found = {digest.hexdigest()} if not is_stat_fingerprint(expected) else {before, stat_fingerprint(source, file)}
    if found != {expected}:
        raise ChangedError(f"'{source}' was changed while the bundle was opened")


def _contains(graph: Path, name: str) -> bool:
    """Return True if the bytes of a name occur in a graph."""
    with graph.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return False  # an empty file cannot be mapped
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            return contents.find(name.encode()) >= 0
