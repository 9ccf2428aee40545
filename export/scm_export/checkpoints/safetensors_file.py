"""Opens ``.safetensors`` files after checking their header, which the safetensors library reads without limits below 100 MB."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from scm_export.errors import CheckpointError
from scm_runtime.common.documents import decode_json
from scm_runtime.common.files import open_regular

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 8 << 20  # of the header; that of a model of 10 000 tensors has 1 MiB
MAX_DEPTH = 4  # of the header: tensors, their fields, and lists


class TensorFile:
    """The tensors and metadata of an open file."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def metadata(self) -> dict[str, str]:
        """Text by key; empty if the file has none."""
        return self._opened.metadata() or {}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, which are views of the file."""
        for name in self._opened.keys():  # noqa: SIM118 - safe_open is not a mapping
            yield name, self._opened.get_tensor(name)


@contextmanager
def open_safetensors(source: Path) -> Iterator[TensorFile]:
    """Open a file for reading its tensors.

    Raises:
        CheckpointError: its header is longer than ``MAX_BYTES`` or than the file, or is nested.
        Exception: the header is not JSON, or the library refuses the file; see :func:`~scm_export.checkpoints.reading.reading`.
    """
    with open_regular(source) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_BYTES or length > source.stat().st_size - 8:
            raise CheckpointError(
                f"'{source}' is not a readable .safetensors file: its header must have at most {MAX_BYTES} bytes and be within the file, got {length}. "
                "Copy or save it again."
            )
        decode_json(file.read(length), max_depth=MAX_DEPTH)
    with safe_open(source, framework="pt") as opened:
        yield TensorFile(opened)
