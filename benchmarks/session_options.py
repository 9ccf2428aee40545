"""What is the effect of one of ONNX Runtime's session options on the CPU? Two steps with scm_runtime's default and with the option set.

Times are measured in turns in one process, peak memory in one process each.

    python benchmarks/session_options.py                                                    enable_mem_pattern=true on the small consistency model
    python benchmarks/session_options.py enable_mem_pattern=true --sizes XXS,SANA-Sprint,CM,LCM

The value is JSON; the results are written to ``session_options.json``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
from _common import AGAIN, Cells, interleaved
from _peers.case import Case
from _peers.ours import open_generator
from _peers.preparing import prepared
from _peers.sizes import SIZES

THREADS = 2
CALLS = 4
# VmHWM, because ru_maxrss includes the size of the parent process.
PEAK = f"""
import json, pathlib, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from _peers.case import Case
from _peers.ours import open_generator
draw = open_generator(Case.load(pathlib.Path(sys.argv[1])), int(sys.argv[2]), {THREADS}, "cpu", session_options=json.loads(sys.argv[3]))
for _ in range({CALLS}):
    draw()
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_mb(folder: Path, n: int, options: dict[str, object]) -> int:
    """Return the peak memory in MB of a process that opens the model and samples a few times."""
    command = [sys.executable, "-c", PEAK, str(folder), str(n), json.dumps(options)]
    return round(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]) * 1024 / 1e6)


def measure(case: Case, n: int, changed: dict[str, object], seconds: float) -> dict[str, Any]:
    """Return milliseconds and megabytes with the default and with the changed option."""
    candidates: dict[str, dict[str, object]] = {"default": {}, "changed": changed}
    draws = {name: open_generator(case, n, THREADS, "cpu", session_options=options) for name, options in candidates.items()}
    once = sum(times["median_ms"] for times in interleaved(draws, repeats=2).values()) / 1e3
    times = interleaved(draws, repeats=max(5, int(seconds / once)), warmup=0)
    return {name: {**times[name], "peak_mb": peak_mb(case.folder, n, options)} for name, options in candidates.items()}


@click.command(help=__doc__.split("\n")[0])
@click.argument("option", default="enable_mem_pattern=true")
@click.option("--sizes", default="CM", show_default=True, help=f"Any of {', '.join(SIZES)}.")
@click.option("--batch-sizes", default="1,8", show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="Duration of the timing of each model and batch size.")
@AGAIN
def main(option: str, sizes: str, batch_sizes: str, seconds: float, again: bool) -> None:
    name, _, value = option.partition("=")
    try:
        changed: dict[str, object] = {name: json.loads(value)}
    except ValueError:
        raise click.BadParameter(f"expected NAME=VALUE with a value in JSON, as enable_mem_pattern=true; got {option!r}") from None
    batches = [int(n) for n in batch_sizes.split(",")]
    if unknown := set(sizes.split(",")) - set(SIZES):
        raise click.BadParameter(f"there is no size {', '.join(sorted(unknown))}; there are: {', '.join(SIZES)}")
    cells = Cells("session_options", again=again)
    for size in sizes.split(","):
        if all(cells.is_measured(option, f"{size}, batch {n}") for n in batches):
            continue
        case = prepared(size, max(batches))
        for n in batches:
            cells.measure(option, f"{size}, batch {n}", by=partial(measure, case, n, changed, seconds))


if __name__ == "__main__":
    main()
