"""Checks a zip archive before anything in it is used: which of torch's formats it is, that it is not a zip bomb, and that it is not damaged."""

from __future__ import annotations

import logging
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from scm_export.errors import CheckpointError
from scm_runtime.common.files import open_regular
from scm_runtime.common.message_text import first_line, printable

MAX_ENTRIES = 100_000  # torch writes one entry per tensor; the largest published networks have some thousands
MAX_COMPRESSED = 256 << 20  # bytes that compressed entries may unpack to; torch compresses only source code

CHUNK = 1 << 20  # bytes
MAX_PICKLE = 64 << 20  # bytes; the pickle of the largest published network has 2 MB, since tensors are stored separately

logger = logging.getLogger("scm_export")

ArchiveKind = Literal["torch.save", "TorchScript", "torch.export"]


def archive_kind(source: Path) -> ArchiveKind:
    """Detect which of torch's formats an archive has, from the names of its entries.

    Raises:
        CheckpointError: the archive is damaged, is a zip bomb, or has none of these formats.
    """
    names = {name for entry in check_archive(source) for name in (entry.filename, entry.filename.partition("/")[2])}
    if {"archive_format", "serialized_exported_program.json"} & names:
        return "torch.export"
    if "constants.pkl" in names:
        return "TorchScript"
    if "data.pkl" in names:
        return "torch.save"
    some = ", ".join(printable(name) for name in sorted(names - {""})[:3])
    raise CheckpointError(
        f"'{source}' is a zip archive, but not one that torch wrote (it holds {some or 'nothing'}). "
        "Expected one of torch.save, torch.export.save or TorchScript."
    )


def check_archive(source: Path) -> list[zipfile.ZipInfo]:
    """Return the entries of an archive.

    Raises:
        CheckpointError: the archive is damaged; its entries claim more bytes than a file of this size can hold, since torch stores tensors
            uncompressed; or its pickle is too large to hold only names and sizes.
    """
    with _opened(source) as archive:
        return _checked_entries(source, archive)


def check_contents(source: Path) -> None:
    """Verify the CRC-32 of every entry of an archive. torch writes these checksums but does not verify them.

    Raises:
        CheckpointError: an entry is damaged; the message names it.
    """
    with open_archive(source):
        pass


@contextmanager
def open_archive(source: Path) -> Iterator[zipfile.ZipFile]:
    """Yield an archive after ``check_archive`` and ``check_contents``. The file is opened once: if another one takes its place, the checked one is read.

    Raises:
        CheckpointError: the archive is damaged or a zip bomb.
    """
    with _opened(source) as archive:
        entries = _checked_entries(source, archive)
        if any(entry.CRC for entry in entries if entry.file_size):
            _check_checksums(source, archive, entries)
        else:
            logger.warning("'%s' was saved without checksums (torch.serialization.set_crc32_options): damage to it would not be detected", source)
            for entry in entries:
                del entry.CRC  # keeps zipfile from comparing it
        yield archive


@contextmanager
def _opened(source: Path) -> Iterator[zipfile.ZipFile]:
    try:
        file = open_regular(source)
    except OSError as error:
        raise _unreadable(source, error) from error
    with file:
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise _unreadable(source, error) from error
        with archive:
            yield archive


def _unreadable(source: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"'{source}' is not a readable {source.suffix or 'zip'} file: truncated or of another format ({first_line(error)}). Copy or save it again."
    )


def _checked_entries(source: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise CheckpointError(f"'{source}' has {len(entries)} entries, at most {MAX_ENTRIES} are allowed. Save the checkpoint again.")
    assert archive.fp is not None
    size = os.fstat(archive.fp.fileno()).st_size
    stored = sum(entry.file_size for entry in entries if entry.compress_type == zipfile.ZIP_STORED)
    unpacked = sum(entry.file_size for entry in entries if entry.compress_type != zipfile.ZIP_STORED)
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED and "/data/" in entry.filename]
    if stored > size or unpacked > MAX_COMPRESSED:
        raise CheckpointError(
            f"'{source}' has {size} bytes and claims to unpack to {stored + unpacked}: refused as a zip bomb. torch stores tensors uncompressed; save it again."
        )
    if large := [entry for entry in entries if entry.filename.endswith("data.pkl") and entry.file_size > MAX_PICKLE]:
        raise CheckpointError(f"'{source}' has a data.pkl of {large[0].file_size} bytes, more than {MAX_PICKLE}: refused. Save the checkpoint again.")
    if packed:
        raise CheckpointError(
            f"'{source}' holds compressed tensors ({printable(packed[0])}), which torch does not write. Save it again, or unpack and store it uncompressed."
        )
    return entries


def _check_checksums(source: Path, archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> None:
    for entry in entries:
        try:
            with archive.open(entry) as file:
                while file.read(CHUNK):
                    pass
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:  # RuntimeError: it is encrypted
            name = printable(entry.filename)
            raise CheckpointError(f"'{source}' is damaged: the entry '{name}' cannot be read ({first_line(error)}). Copy or save it again.") from error
