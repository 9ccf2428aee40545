"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import sys

M_MMAP_THRESHOLD = -3  #  of <malloc.h>
LARGE = 2**20  #          bytes


def give_back_freed_memory() -> None:
    """From now on, let this process give blocks of 1 MiB and more back to the system when they are freed; of glibc, elsewhere nothing happens.

    By itself glibc raises that size up to 32 MiB, and what is smaller it keeps: after a session of ONNX Runtime or two, as much as the weights.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
