"""Files of text embeddings for the command line, as a text encoder's program saves them with ``numpy.savez`` or ``numpy.save``."""

from __future__ import annotations

import os
import zipfile
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from scm_runtime.common.files import open_regular
from scm_runtime.common.message_text import first_line, printable
from scm_runtime.errors import InvalidArgumentError
from scm_runtime.inputs.arguments import EMBEDDINGS

REQUIRED, OPTIONAL = "prompt_embeds", "prompt_attention_mask"
MAX_UNPACKED_BYTES = 2**30  # more than any batch of prompts needs; a hostile archive could fill the memory
MAX_DIMENSIONS = 8

EXPECTED = f"Expected a .npz with the array {REQUIRED} and, if some tokens are padding, {OPTIONAL}; or a .npy with {REQUIRED} alone"


def read_embeddings(path: Path) -> dict[str, NDArray[Any]]:
    """Return a file's arrays by name: ``prompt_embeds``, and others of ``EMBEDDINGS`` if it has them. No code from the file is run.

    Raises:
        InvalidArgumentError: the file does not exist, is not a NumPy file, is damaged or too large, or holds other arrays.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_UNPACKED_BYTES:
                raise ValueError(f"it has {size:,} bytes, more than {MAX_UNPACKED_BYTES:,}")
            if zipfile.is_zipfile(file):
                return _read_archive(file)
            file.seek(0)
            return {REQUIRED: _read_array(file, size)}
    except OSError as error:
        raise InvalidArgumentError(f"cannot read '{path}': {error.strerror or error}. {EXPECTED}.") from error
    except Exception as error:  # zipfile, zlib and NumPy's parsers raise errors of many types for damaged files
        raise InvalidArgumentError(f"cannot read embeddings from '{path}': {printable(first_line(error)).rstrip('.')}. {EXPECTED}.") from error


def _read_archive(file: IO[bytes]) -> dict[str, NDArray[Any]]:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > MAX_UNPACKED_BYTES:
            raise ValueError(f"it unpacks to {unpacked:,} bytes, more than {MAX_UNPACKED_BYTES:,}")
        names = sorted(member.filename.removesuffix(".npy") for member in members)
        if REQUIRED not in names or len(set(names)) < len(names) or not set(names) <= set(EMBEDDINGS):
            raise ValueError(f"it holds {', '.join(names) or 'nothing'}")
        arrays = {}
        for member in members:
            with archive.open(member) as part:
                arrays[member.filename.removesuffix(".npy")] = _read_array(part, member.file_size)
        return arrays


def _read_array(file: IO[bytes], size: int) -> NDArray[Any]:
    """Read a .npy of ``size`` bytes. NumPy allocates an array before it reads the values: check that the file has them."""
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = header[np.lib.format.read_magic(file)](file)
    if dtype.kind not in "biuf":
        raise ValueError(f"its values must be real numbers, got the dtype {dtype}")
    if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0 or prod(shape) * dtype.itemsize > size:
        raise ValueError(f"it cannot hold values of the shape {shape}")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)
