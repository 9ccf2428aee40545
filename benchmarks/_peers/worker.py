"""A process that holds one peer with its model, and draws when it is told to. The other side is client.py.

Its argument is JSON: ``{"opener": "module:function", "folder": ..., "batch_size": 1, "threads": 2, "device": "cpu", "options": {}}``. It writes one line of
JSON when the first draw is done, and reads commands, a line each, which it answers with one: ``draw WARM COUNT``, ``memory``. It
ends when its input does, so that none outlives the benchmark. Libraries may print what they like: their standard output is the error output.
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
    """Of this process alone, bytes: the most it ever had in memory, and what it has now."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"peak_bytes": peak, "resident_bytes": peak}
    found = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return {"peak_bytes": int(found["VmHWM"]) * 1024, "resident_bytes": int(found["VmRSS"]) * 1024}


def timed(draw: Draw, warm: int, count: int) -> dict[str, list[float]]:
    """Milliseconds of each draw, after some that are not counted: caches and threads belonged to another process."""
    for _ in range(warm):
        draw()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        draw()
        times.append((time.perf_counter() - start) * 1e3)
    return {"ms": times}


def serve(spec: dict[str, Any], out: TextIO) -> None:
    """Open the peer, draw, and answer until the input ends."""

    def answer(**content: object) -> None:
        out.write(json.dumps(content) + "\n")
        out.flush()

    model, n = Case.load(Path(spec["folder"])), int(spec["batch_size"])
    module, _, function = spec["opener"].partition(":")
    draw: Draw = getattr(import_module(module), function)(model, n, spec["threads"], spec["device"], **spec["options"])
    first = np.asarray(draw())
    answer(ready=True, error_share=model.error(first))
    for line in sys.stdin:
        match line.split():
            case ["draw", warm, count]:
                answer(**timed(draw, int(warm), int(count)))
            case ["memory"]:
                answer(**memory())
            case _:
                raise ValueError(f"a command must be 'draw WARM COUNT' or 'memory', got {line!r}")


def main() -> None:
    """Serve; say why where that fails."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        serve(json.loads(sys.argv[1]), out)
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is a result
        traceback.print_exc()
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0].strip() if lines else ''}".strip()
        print(json.dumps({"failed": reason[:400]}), file=out, flush=True)
        sys.exit(1)
