"""Shared by the benchmarks: description of the machine, interleaved timing, storage of results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(os.environ.get("SCM_BENCH_RESULTS") or Path(__file__).parent / "results")
"""Folder of the results of one machine; docs/benchmarks.md shows those of the default folder and of amd-zen4."""


def machine() -> dict[str, object]:
    """Return the hardware and the package versions that results are stored with."""
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())
    versions = {name: version for name in ("numpy", "onnxruntime", "onnxruntime-gpu", "torch", "onnx") if (version := _version(name))}
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), **versions}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def interleaved(candidates: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, dict[str, float]]:
    """Time the candidates in turn, round after round, so that noise affects all alike. Returns milliseconds."""
    for _ in range(warmup):
        for run in candidates.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: {"median_ms": statistics.median(values), "min_ms": min(values)} for name, values in times.items()}


def stored_figures(name: str) -> dict[str, Any]:
    """Return the figures of ``NAME.json`` in the results folder if they are from this machine, else an empty dict."""
    try:
        kept = json.loads((RESULTS / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return dict(kept["figures"]) if kept["machine"] == machine() else {}


def save(name: str, figures: object) -> str:
    """Write ``NAME.json`` to the results folder, and return its text."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), "figures": figures}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    return text


def save_and_print(name: str, figures: object) -> None:
    """Save the figures, and print them."""
    print(save(name, figures))
