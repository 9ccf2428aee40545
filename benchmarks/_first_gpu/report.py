"""The report of ``make first-gpu`` as Markdown, from the outcomes of the stages and the files that they have written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _common import read_json
from _paper.forms import FORMS, ideal_seconds
from _paper.gpus import GPUS, Gpu
from _paper.layers import RESOLUTION, operations
from _paper.tables import table
from _peers.models import edm2_config

from _first_gpu.runner import OK, SKIPPED, Outcome

DRY_RUN = "A dry run: nothing here was computed by a GPU, and no figure means anything."
ROOFLINE = """\
A step is the difference of two steps and one. Roofline: the larger of arithmetic at the measured rate of a matrix product and of bytes at the measured rate
of a copy, for every convolution and product. On paper: `benchmarks/paper_model.py`."""


def report(about: Mapping[str, str], sizes: Sequence[str], outcomes: Mapping[str, Outcome], results: Path, *, dry_run: bool) -> str:
    """Return the report. ``about`` describes the machine."""
    parts = [f"# {about['hardware']}", ", ".join(f"{name} {value}" for name, value in about.items() if name != "hardware") + "."]
    if dry_run:
        parts.append(DRY_RUN)
    parts += ["## Stages", table(("stage", "outcome", "seconds"), [_stage_row(name, outcome) for name, outcome in outcomes.items()])]
    rows = [row for size in sizes for kind in ("bench", "bench-tuned") for row in _bench_rows(size, kind, read_json(results / f"{kind}-{size}.json"))]
    if rows:
        text = "EDM2 with sCM's changes, fp16, random weights; whole calls. Tuned: with the measured table of tiles."
        parts += ["## Rows", text, table(("model", "steps", "batch", "median ms", "min ms", "images/s", "of matmul", "of copy"), rows)]
    steps = [row for size in sizes for row in _roofline_rows(size, about["hardware"], results)]
    if steps:
        parts += ["## Roofline of a step, batch 1", ROOFLINE, table(("model", "two steps, ms", "a step, ms", "roofline, ms", "reached", "on paper, ms"), steps)]
    for name, outcome in outcomes.items():
        if outcome["status"] not in (OK, SKIPPED):
            parts += [f"## {name}: {outcome['status']}", "```\n" + "\n".join(outcome["output"]) + "\n```"]
    tests = outcomes.get("tests", {}).get("output", [])
    if tests and outcomes["tests"]["status"] == OK:
        parts += ["## Tests", f"`{tests[-1]}`"]
    return "\n\n".join(parts) + "\n"


def _stage_row(name: str, outcome: Outcome) -> list[str]:
    why = f": {outcome['reason']}" if "reason" in outcome else ""
    return [name, f"{outcome['status']}{why}", f"{outcome['seconds']:.0f}"]


def _bench_rows(size: str, kind: str, result: Mapping[str, Any]) -> list[list[str]]:
    name = f"EDM2-{size}" + (", tuned" if kind == "bench-tuned" else "")
    rows = []
    for cell in result.get("cells", ()):
        head = [name, str(cell["steps"]), str(cell["batch_size"])]
        if cell["median_ms"] is None:
            rows.append([*head, "failed" if cell["error"] else "–", *[""] * 4])
            continue
        times = [f"{cell[key]:.4g}" for key in ("median_ms", "min_ms", "images_per_second")]
        shares = [f"{cell[key]:.0%}" if cell.get(key) is not None else "–" for key in ("product_share", "copy_share")]
        rows.append([*head, *times, *shares])
    return rows


def _roofline_rows(size: str, hardware: str, results: Path) -> list[list[str]]:
    result = read_json(results / f"bench-tuned-{size}.json") or read_json(results / f"bench-{size}.json")
    medians = {cell["steps"]: cell["median_ms"] for cell in result.get("cells", ()) if cell["batch_size"] == 1}
    peak = result.get("peak", {})
    product, copied = peak.get("product_gflops"), peak.get("copy_gb_per_second")
    if edm2_config(size).img_resolution != RESOLUTION or not (medians.get(1) and medians.get(2) and product and copied):
        return []
    step = medians[2] - medians[1]
    known = next((gpu for name, gpu in GPUS.items() if name in hardware), None)
    measured: Gpu = replace(known or GPUS["H200"], tensor_flop=product * 1e9, memory_bytes=copied * 1e9)
    layers = operations(size, scm=True)
    ideal = ideal_seconds(measured, layers) * 1e3
    paper = f"{sum(launch.seconds for launch in FORMS['fused'](known, layers)) * 1e3:.2f}" if known else "–"
    return [[f"EDM2-{size}", f"{medians[2]:.2f}", f"{step:.2f}", f"{ideal:.2f}", f"{ideal / step:.0%}" if step > 0 else "–", paper]]
