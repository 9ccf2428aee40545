"""From the start of a process to its first image: how much time do the cache of optimized graphs and the cache of SHA-256 checksums save?

    python benchmarks/cold_start.py                      digits and XXS
    python benchmarks/cold_start.py "S 64x64x4"          minutes, 3 GB of memory

New processes, in turn, with a warm disk cache: "plain" has no cache (SCM_CACHE_DIR=""), "first" fills an empty one, "cached" uses a filled one, and
"cached, sums forgotten" finds the graphs but must hash every file. "plain, not hashed" has no cache and does not compare checksums, which shows what they
cost. "floor" only imports NumPy and ONNX Runtime. One sample in one step. The weights of XXS and S are random. ``not_shared_mib`` is the private memory of a
process, without file-backed pages; ``peak_mib`` is the largest resident memory while it opened the bundle. Rows that are not measured stay in the results.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
from _common import AGAIN, Cells

from export import in_a_process, write_checkpoint

ROUNDS = {"digits": 9, "XXS 64x64x4": 5, "S 64x64x4": 5}
USUAL = ("digits", "XXS 64x64x4")
PROGRAM = """
import json, sys, time
start = time.perf_counter()
import numpy, onnxruntime
imported = time.perf_counter()
def status(file, name):
    return next(int(line.split()[1]) / 1024 for line in open(file) if line.startswith(name))
if sys.argv[1:]:
    from scm_runtime import Generator
    generate = Generator(sys.argv[1], verify_integrity=sys.argv[2] == "hashed")
    opened, peak = time.perf_counter(), status("/proc/self/status", "VmHWM:")
    generate(0, seed=0, num_inference_steps=1, output_type="np")
    done = time.perf_counter()
    own = status("/proc/self/smaps_rollup", "Anonymous:")
    print(json.dumps({"open_ms": (opened - imported) * 1e3, "first_sample_ms": (done - opened) * 1e3, "not_shared_mib": own, "peak_mib": peak}))
"""


def export_bundle(checkpoint: Path) -> str:
    from scm_export import export

    return str(export(checkpoint, checkpoint.with_suffix(".scm"), verify=False, steps=()).path)


def start(bundle: str | None, cache: Path | str, *, hashed: bool = True) -> dict[str, float]:
    """Run one process, and return its timings."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *([bundle, "hashed" if hashed else "not hashed"] if bundle else [])],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"SCM_CACHE_DIR": str(cache)},
    )
    total = (time.perf_counter() - began) * 1e3
    return {"process_ms": total, **(json.loads(done.stdout) if bundle else {})}


def measure(bundle: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Return the medians of each kind of start."""
    filled, empty = folder / "filled", folder / "empty"
    start(bundle, filled)  # also loads the bundle into the disk cache
    time.sleep(3)  # the checksums of files that were just written are not cached
    start(bundle, filled)
    seen: dict[str, list[dict[str, float]]] = {"floor": [], "plain": [], "plain, not hashed": [], "first": [], "cached, sums forgotten": [], "cached": []}
    for _ in range(rounds):
        shutil.rmtree(empty, ignore_errors=True)
        seen["floor"].append(start(None, ""))
        seen["plain"].append(start(bundle, ""))
        seen["plain, not hashed"].append(start(bundle, "", hashed=False))
        seen["first"].append(start(bundle, empty))
        shutil.rmtree(filled / "verified")
        seen["cached, sums forgotten"].append(start(bundle, filled))
        seen["cached"].append(start(bundle, filled))
    medians = {way: {name: round(statistics.median(row[name] for row in rows), 1) for name in rows[0]} for way, rows in seen.items()}
    size = sum(path.stat().st_size for path in filled.rglob("*") if path.is_file())
    return {"rounds": rounds, "cache_mib": round(size / 2**20, 1), "medians": medians}


def measure_model(name: str) -> dict[str, Any]:
    """Make the bundle of a model and measure it."""
    preset = name.split()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = "digits"
        if preset != "digits":
            checkpoint = in_a_process(write_checkpoint, preset, folder)
            bundle = in_a_process(export_bundle, checkpoint)
        return measure(bundle, ROUNDS[name], folder)


@click.command(help=__doc__.split("\n")[0])
@click.argument("names", nargs=-1, type=click.Choice(list(ROUNDS)))
@AGAIN
def main(names: tuple[str, ...], again: bool) -> None:
    cells = Cells("cold_start", again=again)
    for name in names or USUAL:
        cells.measure(name, by=partial(measure_model, name))


if __name__ == "__main__":
    main()
