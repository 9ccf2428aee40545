"""What the stub's log says about a part of a test: launches, copies, captures, and signs of faults. README.md describes the log."""

from __future__ import annotations

import ctypes
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

FAULTS = ("UNSAFE", "UNSAFE?", "BAD", "STALE", "NO CODE", "UNKNOWN")


class Line(NamedTuple):
    """A line of the log."""

    kind: str
    details: tuple[str, ...]


@cache
def driver() -> Any:
    """Return the stub of the driver, to call its functions for tests."""
    return ctypes.CDLL("libcuda.so.1")


def new_stream(device: int = 0, *, non_blocking: bool = True) -> int:
    """Create a stream on a device, and return its handle."""
    cuda, context, stream = driver(), ctypes.c_void_p(), ctypes.c_void_p()
    cuda.cuInit(0)
    cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    cuda.cuCtxPushCurrent_v2(context)
    cuda.cuStreamCreate(ctypes.byref(stream), int(non_blocking))
    cuda.cuCtxPopCurrent_v2(None)
    assert stream.value is not None
    return stream.value


class Recording:
    """The lines of this process since the recording was created, or since ``restart``."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._start = 0
        self.restart()

    def restart(self) -> None:
        """Forget the lines so far."""
        driver().scm_stub_mark(b"restart")
        self._start = self._log.stat().st_size

    def lines(self, *kinds: str) -> list[Line]:
        """Return the lines of some kinds, or all."""
        driver().scm_stub_mark(b"read")
        with self._log.open(encoding="utf-8") as file:
            file.seek(self._start)
            complete = file.read().rpartition("\n")[0]  # another thread may have written a part of its line
        rows = [line.split("\t") for line in complete.splitlines()]
        return [Line(kind, tuple(details)) for _, _, _, kind, *details in rows if not kinds or kind in kinds]

    def faults(self) -> list[Line]:
        """Return the lines that are signs of a fault."""
        return self.lines(*FAULTS)

    def launches(self) -> Counter[str]:
        """Return the number of kernels and operations that ran, by name, whether launched alone or by a CUDA graph."""
        return Counter(line.details[2] for line in self.lines("kernel") if line.details[0] != "captured")

    def graph_launches(self) -> int:
        """Return the number of CUDA graphs that were launched."""
        return len(self.lines("graph"))

    def copies(self) -> Counter[str]:
        """Return the number of copies that were done, by direction: "HD" is from pageable memory to a device."""
        return Counter(line.details[2] for line in self.lines("copy") if line.details[0] != "captured")

    def plans(self) -> int:
        """Return the number of plans that cuDNN built."""
        return len(self.lines("cudnn graph"))
