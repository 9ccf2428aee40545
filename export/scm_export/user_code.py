"""Finds the line of a user's network that runs, or that has failed, for error messages."""

from __future__ import annotations

import linecache
import os
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

OWN_FOLDERS = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))
STANDARD_LIBRARY = f"{sysconfig.get_path('stdlib')}{os.sep}"


class Line(NamedTuple):
    """A line of source code."""

    file: str
    number: int

    def __str__(self) -> str:
        code = linecache.getline(*self).strip()
        return f"{self.file}:{self.number}" + f"\n    {code}" * bool(code)


def running_line() -> Line | None:
    """The line of the user's code that is running in this thread; None if there is none."""
    return _innermost(reversed(list(traceback.walk_stack(None))))


def failed_line(error: BaseException) -> Line | None:
    """The line of the user's code that raised an error; None if there is none."""
    return _innermost(traceback.walk_tb(error.__traceback__))


def _innermost(frames: Iterable[tuple[FrameType, int]]) -> Line | None:
    """The innermost frame that is not in torch, the exporter or the standard library. Frames begin with the outermost."""
    lines = [Line(frame.f_code.co_filename, number) for frame, number in frames]
    return next((line for line in reversed(lines) if _is_user_code(line.file)), None)


def _is_user_code(file: str) -> bool:
    if file.startswith(STANDARD_LIBRARY) and "-packages" not in file:
        return False
    return not file.startswith((*OWN_FOLDERS, "<"))
