"""How the C library treats memory that has been freed."""

from __future__ import annotations

import ctypes
import sys

M_MMAP_THRESHOLD = -3  #  from <malloc.h>
LARGE_BLOCK = 2**20  #    bytes


def return_freed_memory_to_os() -> None:
    """Make glibc return freed blocks of at least 1 MiB to the operating system, for the rest of the process. Does nothing with other C libraries.

    By default glibc raises that threshold up to 32 MiB and keeps smaller freed blocks. After a few ONNX Runtime sessions they take as much memory as
    the weights.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
