"""How long does a host wait? The import in addition to NumPy and ONNX Runtime, and the time from process start to the first digit on disk."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from _common import AGAIN, Cells

ROUNDS = 15
BASE = "import numpy, onnxruntime"
PROGRAMS = {
    "nothing": "pass",
    "numpy + onnxruntime": BASE,
    "numpy + onnxruntime + scm_runtime": f"{BASE}; import scm_runtime",
    "first digit on disk": "from scm_runtime import Generator; Generator('digits')(3, seed=0).save(r'{out}')",
}


def measure() -> dict[str, float]:
    """Return the median milliseconds of each program, run in turn."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "digit.png"
        programs = {name: [sys.executable, "-c", code.format(out=out)] for name, code in PROGRAMS.items()}
        programs["scm-runtime generate"] = [sys.executable, "-m", "scm_runtime.cli", "generate", "digits", "-o", str(out), "--labels", "3"]
        times: dict[str, list[float]] = {name: [] for name in programs}
        # With compiled bytecode, as pip installs it. The first round fills the disk cache.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        for _ in range(ROUNDS + 1):
            for name, command in programs.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, env=environment)
                times[name].append((time.perf_counter() - start) * 1e3)
        return {name: statistics.median(values[1:]) for name, values in times.items()}


@click.command(help=__doc__)
@AGAIN
def main(again: bool) -> None:
    cells = Cells("startup", again=again)
    cells.measure("median_ms", by=measure)
    medians = cells.get("median_ms")
    cells.note("import scm_runtime adds, ms", value=medians["numpy + onnxruntime + scm_runtime"] - medians["numpy + onnxruntime"])


if __name__ == "__main__":
    main()
