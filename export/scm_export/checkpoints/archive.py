"""A look at a zip archive before anything in it is read: which of torch's formats it is, and that it is no larger than it seems."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal

from scm_runtime.errors import CheckpointError

MAX_COMPRESSED = 256 << 20  # bytes that compressed entries may unpack to; torch compresses source code and nothing else

ArchiveKind = Literal["torch.save", "TorchScript", "torch.export"]


def archive_kind(source: Path) -> ArchiveKind:
    """Which of torch's formats an archive is, by the names in it.

    Raises:
        CheckpointError: damaged, a zip bomb, or none of them.
    """
    names = {entry.filename.partition("/")[2] for entry in check_archive(source)} | {entry.filename for entry in check_archive(source)}
    if {"archive_format", "serialized_exported_program.json"} & names:
        return "torch.export"
    if "constants.pkl" in names:
        return "TorchScript"
    if "data.pkl" in names:
        return "torch.save"
    some = ", ".join(sorted(names - {""})[:3])
    raise CheckpointError(
        f"'{source}' is a zip archive, but not one that torch wrote (it holds {some or 'nothing'}). "
        "Expected one of torch.save, torch.export.save or TorchScript."
    )


def check_archive(source: Path) -> list[zipfile.ZipInfo]:
    """The entries of an archive.

    Raises:
        CheckpointError: damaged, or its entries claim more than a file of this size holds: torch stores tensors uncompressed.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        ending = source.suffix or "zip"
        raise CheckpointError(f"'{source}' is not a readable {ending} file: truncated or of another format ({error}). Copy or save it again.") from error
    size = source.stat().st_size
    stored = sum(entry.file_size for entry in entries if entry.compress_type == zipfile.ZIP_STORED)
    unpacked = sum(entry.file_size for entry in entries if entry.compress_type != zipfile.ZIP_STORED)
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED and "/data/" in entry.filename]
    if stored > size or unpacked > MAX_COMPRESSED:
        raise CheckpointError(
            f"'{source}' has {size} bytes and claims to unpack to {stored + unpacked}: refused as a zip bomb. torch stores tensors uncompressed; save it again."
        )
    if packed:
        raise CheckpointError(
            f"'{source}' holds compressed tensors ({packed[0]}), which torch does not write. Save it again, or unpack and store it uncompressed."
        )
    return entries
