"""The prompts of ``scm-runtime generate``: from its options, and from files."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from scm_runtime.errors import InvalidArgumentError

MAX_BYTES = 64 << 20
STANDARD_INPUT = "-"


def gather_prompts(given: Sequence[str], file: str | None) -> str | list[str] | None:
    """Return the prompts of the options ``--prompt`` and ``--prompts``: a string for all samples, or a list; None if there are none.

    Raises:
        InvalidArgumentError: both are given, or the file cannot be used.
    """
    if file is None:
        return given[0] if len(given) == 1 else list(given) or None
    if given:
        raise InvalidArgumentError("--prompt and --prompts cannot be used together. Put all prompts into the file, or repeat --prompt.")
    return read_prompt_file(file)


def read_prompt_file(path: str) -> list[str]:
    """Return the lines of a UTF-8 file that are not blank; of standard input if the path is "-".

    Raises:
        InvalidArgumentError: the file cannot be read, is too large, is not UTF-8, or has no prompt.
    """
    shown = "standard input" if path == STANDARD_INPUT else f"'{path}'"
    if path == STANDARD_INPUT and sys.stdin is None:
        raise InvalidArgumentError("prompts cannot be read from standard input, which is closed. Give a file.")
    try:
        data = _read(sys.stdin.buffer) if path == STANDARD_INPUT else _read_path(Path(path))
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"cannot read prompts from {shown}: {getattr(error, 'strerror', None) or error}. Expected a text file.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidArgumentError(
            f"prompts must be UTF-8, got the byte 0x{data[error.start]:02x} in line {line} of {shown}. Save the file as UTF-8."
        ) from error
    prompts = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise InvalidArgumentError(f"{shown} must have at least one prompt, one per line; it has no line with text")
    return prompts


def _read_path(path: Path) -> bytes:
    with path.open("rb") as file:  # also a pipe, as in --prompts <(…)
        return _read(file)


def _read(file: BinaryIO) -> bytes:
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
    return data


def as_unicode(text: str | os.PathLike[str]) -> str:
    """Escape the bytes of a command line's argument that are not UTF-8."""
    return os.fspath(text).encode("utf-8", "backslashreplace").decode()
