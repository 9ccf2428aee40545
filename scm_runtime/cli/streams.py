"""Standard output and standard error of the command lines. They may be closed, full, or unable to encode a character; none of that is a traceback."""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import sys
from contextlib import suppress
from typing import TextIO

from scm_runtime.common.message_text import escape_controls, safe_message

MAX_MESSAGE = 8000  # characters; what files say is shortened where it is read, this bounds everything else
REPLACEMENTS = {"→": "->", "…": "...", "×": "x", "–": "-", "—": "-", "σ": "sigma", "“": '"', "”": '"', "’": "'"}


def prepare_streams() -> None:
    """Make the standard streams usable: closed ones discard their output, and characters that the encoding lacks are replaced by ASCII."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, so that no file of ours becomes standard output
    codecs.register_error("scm_ascii", _replace_by_ascii)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_LogFormatter())  # what prints warnings if the program has not configured logging
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - stays open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="scm_ascii")


class _LogFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))


def _replace_by_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(REPLACEMENTS.get(char) or char.encode("ascii", "backslashreplace").decode() for char in text), error.end


def discard_output(*streams: TextIO) -> None:
    """Discard everything that is still written to streams, so that their buffers do not raise again when the process ends."""
    for stream in streams:
        with suppress(OSError, ValueError), open(os.devnull, "w") as devnull:  # noqa: PTH123 - ValueError: a stream without a descriptor
            os.dup2(devnull.fileno(), stream.fileno())


def is_broken(stream: TextIO) -> bool:
    """Return True if a stream holds output that cannot be written."""
    try:
        stream.flush()
    except OSError:
        return True
    return False


def encodable(text: str) -> str:
    """Replace what standard output cannot encode. click writes UTF-8 whatever the encoding, so its text must be ASCII already where that is all there is."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "scm_ascii").decode(encoding)


def say(text: str) -> None:
    """Print text, with control characters escaped."""
    _write(sys.stdout, escape_controls(text))


def say_error(text: str) -> None:
    """Print text on standard error, with control characters escaped. That it cannot be written is ignored: there is nowhere to say so."""
    try:
        _write(sys.stderr, safe_message(text, MAX_MESSAGE))
    except OSError:
        discard_output(sys.stderr)


def _write(stream: TextIO, text: str) -> None:
    stream.write(f"{text}\n")
    stream.flush()


def print_json(document: bytes) -> None:
    """Print a JSON document: in UTF-8, or with escapes if standard output is not."""
    utf_8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
    _write(sys.stdout, document.decode() if utf_8 else json.dumps(json.loads(document), indent=2))
