"""Where does the time of a step go? Milliseconds by type of operator, from ONNX Runtime's profile of the step graph, batch 1.

    python benchmarks/breakdown.py           XXS
    python benchmarks/breakdown.py XXS S     both

Profiling has an overhead of some percent: compare shares. "arithmetic" is the number of operations of convolutions and matrix products per second of their
own time; ``peers.json`` has the machine's peak ("roof").
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from _common import save_and_print
from _peers.models import edm2_config, random_checkpoint
from torch.utils.flop_counter import FlopCounterMode

from scm_export import export
from scm_export.checkpoints import load_checkpoint
from scm_export.families import build_model
from scm_runtime import Generator

KNOWN = ("XXS", "S")
CALLS = {"XXS": 20, "S": 4}  # of two steps each; the first call is not counted
PRODUCTS = ("Conv", "Conv3x3", "FusedConv", "MatMul", "FusedMatMul", "Gemm", "CosineAttention", "Attention", "MaskedAttention")


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


def flop_of_a_step(checkpoint: Path) -> float:
    model = build_model(load_checkpoint(checkpoint))
    x, t = torch.randn(1, *model.sample_shape), torch.full((1,), 1.0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.step(x, t, t * 0.5, x, {"class_labels": torch.zeros(1, dtype=torch.int64)})
    return float(counter.get_total_flops())


def measure(size: str) -> dict[str, Any]:
    """Measure one size with the native kernels and with the function bodies."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = random_checkpoint(edm2_config(size), folder / f"{size}.pt")
        flop = flop_of_a_step(checkpoint)
        bundle = export(checkpoint, folder / f"{size}.scm", verify=False, steps=()).path
        for name, native in (("kernels", "auto"), ("function bodies", False)):
            profiles = folder / name
            profiles.mkdir()
            with Generator(bundle, native_ops=native, profile_dir=profiles, cache_dir=False) as generate:  # type: ignore[arg-type]  # bool or "auto"
                for _ in range(CALLS[size]):
                    generate(3, seed=0, output_type="latent")
                if name == "kernels" and not generate.info.native_ops:
                    continue
            operators, whole = by_operator(next(profiles.glob("step*.json")), skip=2)
            products = sum(value for operator, value in operators.items() if operator in PRODUCTS)
            figures[name] = {
                "step_ms": whole,
                "ms": operators,
                "share": {operator: round(value / whole, 3) for operator, value in operators.items()},
                "between_operators_ms": max(0.0, whole - sum(operators.values())),
                "arithmetic_flop_per_s": flop / products * 1e3,
            }
    return {"flop": flop, **figures}


def main() -> None:
    sizes = sys.argv[1:] or KNOWN[:1]
    if unknown := sorted(set(sizes) - set(KNOWN)):
        sys.exit(f"no size {', '.join(unknown)}; there are {', '.join(KNOWN)}")
    save_and_print("breakdown", {size: measure(size) for size in sizes})


if __name__ == "__main__":
    main()
