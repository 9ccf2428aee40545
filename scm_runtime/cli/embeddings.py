"""Text embeddings in a file, for the command line: what a text encoder elsewhere has saved with ``numpy.savez`` or ``numpy.save``."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scm_runtime.errors import InvalidArgumentError

REQUIRED, OPTIONAL = "prompt_embeds", "prompt_attention_mask"
LARGEST = 2**30  # bytes unpacked: more than any batch of prompts, less than what a hostile archive unpacks to

EXPECTED = f"Expected a .npz with the array {REQUIRED} and, where some tokens do not count, {OPTIONAL}; or a .npy with {REQUIRED} alone"


def read_embeddings(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file by name: ``prompt_embeds``, and ``prompt_attention_mask`` where it has one. No code from the file is run.

    Raises:
        InvalidArgumentError: there is no such file, or it is none of NumPy's, damaged, too large, or holds other arrays.
    """
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                return {REQUIRED: np.lib.format.read_array(file, allow_pickle=False)}
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > LARGEST:
            raise ValueError(f"it unpacks to {unpacked:,} bytes, more than {LARGEST:,}")
        with np.load(path, allow_pickle=False) as arrays:
            names = set(arrays.files)
            if REQUIRED not in names or not names <= {REQUIRED, OPTIONAL}:
                raise ValueError(f"it holds {', '.join(sorted(names)) or 'nothing'}")
            return {name: arrays[name] for name in arrays.files}
    except OSError as error:
        raise InvalidArgumentError(f"cannot read '{path}': {error.strerror or error}. {EXPECTED}.") from error
    except Exception as error:  # zipfile, zlib and NumPy's parsers raise errors of many types for damaged files
        reason = str(error) or type(error).__name__
        raise InvalidArgumentError(f"cannot read embeddings from '{path}': {reason.splitlines()[0].rstrip('.')}. {EXPECTED}.") from error
