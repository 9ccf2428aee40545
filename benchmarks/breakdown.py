"""Where does the time of a step go? Milliseconds by type of operator, from ONNX Runtime's profile of the step graph.

    python benchmarks/breakdown.py                                 XXS at batch 1
    python benchmarks/breakdown.py CM LCM SANA-Sprint              the small models of diffusers' families at batch 1
    python benchmarks/breakdown.py XXS S --batch-sizes 1,8

Each model is measured with the native kernels, with them in bfloat16, and with the function bodies. Profiling has an overhead of some percent: compare
shares. "arithmetic" is the number of operations of convolutions and matrix products per second of their own time; ``peers.json`` has the machine's peak
("roof").
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import click
from _common import AGAIN, Cells
from _peers.case import Case
from _peers.machine import physical_cores
from _peers.ours import arguments
from _peers.preparing import prepared
from _peers.sizes import SIZES

from scm_runtime import Generator
from scm_runtime.ort.options import MATMUL_PRECISION

SECONDS, MIN_CALLS = 6.0, 3  # of calls of two steps each; the first call is not counted
PRODUCTS = (
    *("Conv", "FusedConv", "MatMul", "FusedMatMul", "Gemm", "Attention", "MaskedAttention", "ReLULinearAttention", "DepthwiseGLU"),
    *("Conv3x3", "CosineAttention", "Conv3x3ModulateSiLU", "Conv3x3MPSum", "MatMulMPSum"),
)
WAYS: dict[str, dict[str, Any]] = {
    "kernels": {"native_ops": True},
    "kernels, bf16": {"native_ops": True, "session_options": {MATMUL_PRECISION: "medium"}},
    "function bodies": {"native_ops": False},
}


def by_operator(profile: Path, skip: int) -> tuple[dict[str, float], float]:
    """Return milliseconds per run by operator, and of the whole run: medians over all runs after the first ``skip``."""
    events = json.loads(profile.read_text())
    runs: list[dict[str, float]] = []
    whole: list[float] = []
    current: dict[str, float] = defaultdict(float)
    for event in sorted(events, key=lambda event: event["ts"] + event["dur"]):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            current[event["args"]["op_name"]] += event["dur"] / 1e3
        elif event.get("name") == "model_run":
            runs.append(current)
            whole.append(event["dur"] / 1e3)
            current = defaultdict(float)
    runs, whole = runs[skip:], whole[skip:]
    names = {name for run in runs for name in run}
    medians = {name: statistics.median(run.get(name, 0.0) for run in runs) for name in names}
    return dict(sorted(medians.items(), key=lambda item: -item[1])), statistics.median(whole)


def measure(case: Case, n: int, options: dict[str, Any]) -> dict[str, Any]:
    """Return milliseconds and shares of a step by operator."""
    with tempfile.TemporaryDirectory() as temporary:
        profiles = Path(temporary)
        with Generator(case.bundle, device="cpu", threads=physical_cores(), profile_dir=profiles, cache_dir=False, **options) as generate:
            given = arguments(case, n)
            generate(**given)
            end, calls = time.perf_counter() + SECONDS, 0
            while calls < MIN_CALLS or time.perf_counter() < end:
                generate(**given)
                calls += 1
        operators, whole = by_operator(next(profiles.glob("step*.json")), skip=given["num_inference_steps"])
    products = sum(value for operator, value in operators.items() if operator in PRODUCTS)
    return {
        "step_ms": whole,
        "ms": operators,
        "share": {operator: round(value / whole, 3) for operator, value in operators.items()},
        "between_operators_ms": max(0.0, whole - sum(operators.values())),
        "arithmetic_flop_per_s": n * case.facts.flop / given["num_inference_steps"] / products * 1e3 if products else None,
    }


def table(row: dict[str, Any]) -> str:
    """Return the milliseconds of all ways as a table, the largest of the first way first, without operators that take less than half a percent."""
    ways = [name for name in WAYS if name in row]
    operators = list(dict.fromkeys(operator for way in ways for operator, share in row[way]["share"].items() if share >= 0.005))
    lines = [["a step", *(f"{row[way]['step_ms']:.2f}" for way in ways)]]
    lines += [[one, *(f"{row[way]['ms'][one]:.2f} ({row[way]['share'][one]:.0%})" if one in row[way]["ms"] else "-" for way in ways)] for one in operators]
    return "\n".join(f"{line[0]:24}" + "".join(f"{cell:>22}" for cell in line[1:]) for line in ([["ms", *ways], *lines]))


@click.command(help=__doc__.split("\n")[0])
@click.argument("sizes", nargs=-1, type=click.Choice(list(SIZES)))
@click.option("--batch-sizes", default="1", show_default=True)
@AGAIN
def main(sizes: tuple[str, ...], batch_sizes: str, again: bool) -> None:
    try:
        batches = [int(n) for n in batch_sizes.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"--batch-sizes must be whole numbers separated by commas, got {batch_sizes}") from error
    cells = Cells("breakdown", again=again)
    for size in sizes or ("XXS",):
        for n in batches:
            name = f"{size}, batch {n}"
            if not all(cells.is_measured(name, way) for way in WAYS):
                case = prepared(size, max(batches))
                cells.note(name, "flop", value=n * case.facts.flop / (len(case.facts.times) - 1))
                for way, options in WAYS.items():
                    cells.measure(name, way, by=partial(measure, case, n, options), show=False)
            print(f"\n{name}\n{table(cells.get(name))}", flush=True)


if __name__ == "__main__":
    main()
