"""What the benchmarks share: naming the machine, interleaving the candidates, keeping the figures."""

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
"""One folder a machine; README shows the figures of the usual one."""


def machine() -> dict[str, object]:
    """The hardware and the versions that the figures belong to."""
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())
    versions = {name: version for name in ("numpy", "onnxruntime", "onnxruntime-gpu", "torch", "onnx") if (version := _version(name))}
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), **versions}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def interleaved(candidates: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, dict[str, float]]:
    """Time candidates in turn, round after round, so that a noisy machine disturbs all alike. Milliseconds."""
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


def earlier(name: str) -> dict[str, Any]:
    """The figures of ``NAME.json`` in the folder of results, if they are of this machine; else none."""
    try:
        kept = json.loads((RESULTS / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return dict(kept["figures"]) if kept["machine"] == machine() else {}


def save(name: str, figures: object) -> str:
    """Write ``NAME.json`` there, and return its text."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), "figures": figures}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    return text


def keep(name: str, figures: object) -> None:
    """Save and print."""
    print(save(name, figures))
