"""Files of text embeddings for the command line, as a text encoder's program saves them with ``numpy.savez`` or ``numpy.save``."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scm_runtime.common.files import open_regular
from scm_runtime.common.message_text import first_line
from scm_runtime.errors import InvalidArgumentError

REQUIRED, OPTIONAL = "prompt_embeds", "prompt_attention_mask"
MAX_UNPACKED_BYTES = 2**30  # more than any batch of prompts needs; a hostile archive could fill the memory

EXPECTED = f"Expected a .npz with the array {REQUIRED} and, if some tokens are padding, {OPTIONAL}; or a .npy with {REQUIRED} alone"


def read_embeddings(path: Path) -> dict[str, NDArray[Any]]:
    """Return a file's arrays by name: ``prompt_embeds``, and ``prompt_attention_mask`` if it has one. No code from the file is run.

    Raises:
        InvalidArgumentError: the file does not exist, is not a NumPy file, is damaged or too large, or holds other arrays.
    """
    try:
        with open_regular(path) as file:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                return {REQUIRED: np.lib.format.read_array(file, allow_pickle=False)}
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > MAX_UNPACKED_BYTES:
            raise ValueError(f"it unpacks to {unpacked:,} bytes, more than {MAX_UNPACKED_BYTES:,}")
        with np.load(path, allow_pickle=False) as arrays:
            names = set(arrays.files)
            if REQUIRED not in names or not names <= {REQUIRED, OPTIONAL}:
                raise ValueError(f"it holds {', '.join(sorted(names)) or 'nothing'}")
            return {name: arrays[name] for name in arrays.files}
    except OSError as error:
        raise InvalidArgumentError(f"cannot read '{path}': {error.strerror or error}. {EXPECTED}.") from error
    except Exception as error:  # zipfile, zlib and NumPy's parsers raise errors of many types for damaged files
        raise InvalidArgumentError(f"cannot read embeddings from '{path}': {first_line(error).rstrip('.')}. {EXPECTED}.") from error
