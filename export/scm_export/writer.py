"""A bundle on disk: written beside its destination, flushed, and renamed into place, so that it appears whole or not at all."""

from __future__ import annotations

import hashlib
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
from scm_runtime.bundle.manifest import MANIFEST, WEIGHTS, FileEntry, Manifest, sha256
from scm_runtime.common.files import beside
from scm_runtime.errors import OutputError, ScmError

PAGE = 4096  # offsets of larger tensors, so that a runtime can map them


class BundleWriter:
    """The files of a bundle in the making. All graphs share one weights file, in which equal tensors stand once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._weights = (folder / WEIGHTS).open("xb")
        self._sum = hashlib.sha256()
        self._places: dict[bytes, int] = {}

    def graph(self, name: str, model: ir.Model) -> ModelProto:
        """Write a graph, its larger tensors into the weights file; returns it with references in their place."""
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
        """Write a graph whose larger tensors are references already."""
        proto.producer_name = "scm-export"
        path = self.folder / name
        path.write_bytes(proto.SerializeToString(deterministic=True))
        self._weights.flush()
        onnx.checker.check_model(path)

    def _store(self, data: memoryview) -> int:
        digest = hashlib.sha256(data).digest()
        if digest not in self._places:
            self._append(bytes(-self._weights.tell() % (PAGE if len(data) >= 16 * PAGE else 64)))
            self._places[digest] = self._weights.tell()
            self._append(data)
        return self._places[digest]

    def _append(self, data: bytes | memoryview) -> None:
        self._weights.write(data)
        self._sum.update(data)  # rather than read gigabytes again

    def close(self) -> dict[str, FileEntry]:
        """Finish the weights file and describe every file for the manifest."""
        if self._weights.tell() == 0:
            self._append(bytes(64))  # an analytic model has no weights; the file is part of the layout
        self._weights.close()
        sums = {WEIGHTS: self._sum.hexdigest()}
        return {path.name: FileEntry(size=path.stat().st_size, sha256=sums.get(path.name) or sha256(path)) for path in sorted(self.folder.iterdir())}

    def abandon(self) -> None:
        """Let go of the weights file, whatever became of it; after close() this does nothing."""
        with suppress(OSError):
            self._weights.close()

    def manifest(self, manifest: Manifest) -> None:
        """Write ``scm.json``, over an earlier one if there is one."""
        (self.folder / MANIFEST).write_bytes(manifest.to_json() + b"\n")


@contextmanager
def new_bundle(destination: Path, *, force: bool) -> Iterator[BundleWriter]:
    """A folder beside the destination that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: the destination exists (and force is False, or it is no bundle), or cannot be written.
    """
    check_destination(destination, force=force)
    part, writer = beside(destination, "part"), None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        writer = BundleWriter(part)
        yield writer
        _flush(part)
        check_destination(destination, force=force)  # again: something may have appeared there meanwhile
        if destination.exists():
            old = beside(destination, "old")
            try:
                destination.rename(old)
                part.rename(destination)
            finally:  # an interrupt too must not lose the earlier bundle
                if not destination.exists():
                    old.rename(destination)
            shutil.rmtree(old, ignore_errors=True)
        else:
            part.rename(destination)
        _sync(destination.absolute().parent)
    except OSError as error:
        if isinstance(error, ScmError):
            raise
        raise OutputError(
            f"cannot write the bundle '{destination}': {error.strerror or error}. No bundle was left behind. Free some space or choose another path with -o."
        ) from error
    finally:
        if writer is not None:
            writer.abandon()
        shutil.rmtree(part, ignore_errors=True)


def check_destination(destination: Path, *, force: bool) -> None:
    """Refuse a destination that cannot be written or would lose something, before the work begins; raises OutputError."""
    try:
        taken = destination.exists() or destination.is_symlink()
        bundle = (destination / MANIFEST).is_file() or (destination.is_dir() and not any(destination.iterdir()))
        parent = next(folder for folder in destination.absolute().parents if folder.exists())
    except OSError as error:
        raise OutputError(f"cannot write the bundle '{destination}': {error.strerror or error}. Choose another path with -o.") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        wrong = "you may not write there" if parent.is_dir() else "that is a file, not a folder"
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
