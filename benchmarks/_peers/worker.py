"""A process that loads one peer with its model and runs it on command. The other side of the protocol is client.py.

Its argument is JSON: ``{"opener": "module:function", "folder": ..., "batch_size": 1, "threads": 2, "device": "cpu", "options": {}}``. It writes one line of
JSON after the first result, then reads one command per line and answers each with one line: ``draw WARM COUNT``, ``memory``. It ends when its
input is closed, so that it does not outlive the benchmark. Output that libraries print is redirected to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from _peers.case import Case, Draw


def memory() -> dict[str, int]:
    """Return the peak and current memory of this process in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"peak_bytes": peak, "resident_bytes": peak}
    found = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return {"peak_bytes": int(found["VmHWM"]) * 1024, "resident_bytes": int(found["VmRSS"]) * 1024}


def timed(draw: Draw, warm: int, count: int) -> dict[str, list[float]]:
    """Return the milliseconds of each call, after some untimed ones, because another process has used the caches and cores before."""
    for _ in range(warm):
        draw()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        draw()
        times.append((time.perf_counter() - start) * 1e3)
    return {"ms": times}


def serve(spec: dict[str, Any], out: TextIO) -> None:
    """Open the peer, run it once, and answer commands until the input is closed."""

    def answer(**content: object) -> None:
        out.write(json.dumps(content) + "\n")
        out.flush()

    model, n = Case.load(Path(spec["folder"])), int(spec["batch_size"])
    module, _, function = spec["opener"].partition(":")
    draw: Draw = getattr(import_module(module), function)(model, n, spec["threads"], spec["device"], **spec["options"])
    start = time.perf_counter()
    first = np.asarray(draw())
    answer(ready=True, first_ms=(time.perf_counter() - start) * 1e3, error_share=model.error(first))
    for line in sys.stdin:
        match line.split():
            case ["draw", warm, count]:
                answer(**timed(draw, int(warm), int(count)))
            case ["memory"]:
                answer(**memory())
            case _:
                raise ValueError(f"a command must be 'draw WARM COUNT' or 'memory', got {line!r}")


def main() -> None:
    """Serve, and report the reason of a failure."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        serve(json.loads(sys.argv[1]), out)
    except Exception as error:  # noqa: BLE001 - any error of a peer is a result
        traceback.print_exc()
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0].strip() if lines else ''}".strip()
        print(json.dumps({"failed": reason[:400]}), file=out, flush=True)
        sys.exit(1)
