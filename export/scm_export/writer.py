"""Writing of bundles: into a folder beside the destination that is flushed and renamed, so that a bundle appears completely or not at all."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto
from onnxscript import ir

from scm_export.graphs.functions import INLINE_BELOW
from scm_runtime.bundle.checksums import sha256
from scm_runtime.bundle.manifest import MANIFEST, WEIGHTS, FileEntry, Manifest
from scm_runtime.common.exchange import exchange
from scm_runtime.common.files import beside
from scm_runtime.common.parts import locked_part, sweep
from scm_runtime.errors import OutputError, ScmError

logger = logging.getLogger("scm_export")
PAGE = 4096  # alignment in bytes of large tensors in the weights file, so that a runtime can map them


class BundleWriter:
    """Writes the files of a bundle. All graphs share one weights file, in which equal tensors are stored once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._weights = (folder / WEIGHTS).open("xb")
        self._weights_sha256 = hashlib.sha256()
        self._offsets: dict[bytes, int] = {}  # by the SHA-256 of a tensor's bytes

    def graph(self, name: str, model: ir.Model) -> ModelProto:
        """Write a graph, with its larger tensors in the weights file. Returns the graph with references to them."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= INLINE_BELOW:
                offset = self._store(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
                value.const_value = ir.ExternalTensor(
                    WEIGHTS, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name or "", base_dir=self.folder
                )
        proto = ir.to_proto(model)
        self.proto(name, proto)
        return proto

    def proto(self, name: str, proto: ModelProto) -> None:
        """Write a graph whose larger tensors already refer to the weights file."""
        proto.producer_name = "scm-export"
        path = self.folder / name
        path.write_bytes(proto.SerializeToString(deterministic=True))
        self._weights.flush()
        onnx.checker.check_model(path)

    def _store(self, data: memoryview) -> int:
        digest = hashlib.sha256(data).digest()
        if digest not in self._offsets:
            self._append(bytes(-self._weights.tell() % (PAGE if len(data) >= 16 * PAGE else 64)))
            self._offsets[digest] = self._weights.tell()
            self._append(data)
        return self._offsets[digest]

    def _append(self, data: bytes | memoryview) -> None:
        self._weights.write(data)
        self._weights_sha256.update(data)  # instead of reading gigabytes again

    def close(self) -> dict[str, FileEntry]:
        """Finish the weights file. Returns size and SHA-256 of every file for the manifest."""
        if self._weights.tell() == 0:
            self._append(bytes(64))  # an analytic model has no weights, but every bundle has the file
        self._weights.close()
        known = {WEIGHTS: self._weights_sha256.hexdigest()}
        return {path.name: FileEntry(size=path.stat().st_size, sha256=known.get(path.name) or sha256(path)) for path in sorted(self.folder.iterdir())}

    def abandon(self) -> None:
        """Close the weights file without finishing it. Does nothing after close()."""
        with suppress(OSError):
            self._weights.close()

    def manifest(self, manifest: Manifest) -> None:
        """Write ``scm.json``, replacing an earlier one."""
        (self.folder / MANIFEST).write_bytes(manifest.to_json() + b"\n")


@contextmanager
def new_bundle(destination: Path, *, force: bool) -> Iterator[BundleWriter]:
    """Context with a writer into a temporary folder, which becomes the destination at the end, or is removed if an exception is raised.

    Raises:
        OutputError: the destination exists (and force is False, or it is not a bundle), or cannot be written.
    """
    _restore(destination)
    check_destination(destination, force=force)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _sweep(destination)
        with locked_part(destination, folder=True) as part:
            writer = BundleWriter(part)
            try:
                yield writer
            finally:
                writer.abandon()
            _flush(part)
            check_destination(destination, force=force)  # again: it may have been created in the meantime
            if not destination.exists():
                part.rename(destination)
            elif not exchange(part, destination):  # else the earlier bundle is now the part, which is removed
                _replace(destination, part)
            _sync(destination.absolute().parent)
    except OSError as error:
        if isinstance(error, ScmError):
            raise
        raise OutputError(
            f"cannot write the bundle '{destination}': {error.strerror or error}. No bundle was left behind. Free some space or choose another path with -o."
        ) from error


def _replace(destination: Path, part: Path) -> None:
    """Replace a bundle by two renames, on a system that cannot exchange names. ``_restore`` restores it if the process is killed between them."""
    old = beside(destination, "old")
    try:
        destination.rename(old)
        part.rename(destination)
    finally:  # not even an interrupt may lose the earlier bundle
        if not destination.exists():
            old.rename(destination)
    _remove(old)


def _restore(destination: Path) -> None:
    """Restore a bundle that a killed export with --force had moved and not yet replaced."""
    with suppress(OSError):  # check_destination reports it; or another export has restored the bundle
        if not destination.exists() and (replaced := _replaced_bundles(destination)):
            max(replaced, key=lambda path: path.lstat().st_mtime).rename(destination)
            logger.info("restored '%s', which an export with --force was replacing when it was killed", destination)


def _sweep(destination: Path) -> None:
    """Remove what killed exports left beside a destination: unfinished bundles, and bundles that were already replaced."""
    sweep(destination.parent)
    if destination.exists():
        for path in _replaced_bundles(destination):
            logger.info("removing '%s', the bundle that an export with --force replaced before it was killed", path)
            _remove(path)


def _replaced_bundles(destination: Path) -> list[Path]:
    return [path for path in destination.parent.iterdir() if path.name.startswith(f".{destination.name}.old-")]


def _remove(bundle: Path) -> None:
    with suppress(OSError):
        bundle.unlink() if bundle.is_symlink() else shutil.rmtree(bundle, ignore_errors=True)


def check_destination(destination: Path, *, force: bool) -> None:
    """Raise OutputError if the destination cannot be written, or if an existing file or bundle would be lost."""
    try:
        taken = destination.exists() or destination.is_symlink()
        bundle = (destination / MANIFEST).is_file() or (destination.is_dir() and not any(destination.iterdir()))
        parent = next(folder for folder in destination.absolute().parents if folder.exists())
    except OSError as error:
        raise OutputError(f"cannot write the bundle '{destination}': {error.strerror or error}. Choose another path with -o.") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        wrong = "the folder is not writable" if parent.is_dir() else "that is a file, not a folder"
        raise OutputError(f"cannot write the bundle '{destination}' below '{parent}': {wrong}. Choose another path with -o.")
    if not taken:
        return
    if not bundle:
        raise OutputError(f"'{destination}' exists and is no bundle: it is not replaced. Choose another path with -o.")
    if not force:
        raise OutputError(f"'{destination}' exists. Choose another path with -o, or replace it with --force.")


def _flush(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
