"""Properties of the machine: cores, memory of a GPU, and peak rates."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

GPU_FIELDS = "name,memory.total,driver_version"


def physical_cores() -> int:
    """Return the number of physical cores that this process may use."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def gpu() -> dict[str, str] | None:
    """Return name, memory and driver of the first GPU; None without a GPU."""
    rows = _nvidia_smi(GPU_FIELDS)
    return dict(zip(("gpu", "gpu_memory", "driver"), rows[0].split(", "), strict=True)) if rows else None


def gpu_bytes_used() -> int | None:
    """Return the memory used on the first GPU by all processes; None without a GPU."""
    rows = _nvidia_smi("memory.used")
    return int(rows[0].split()[0]) << 20 if rows else None


def _nvidia_smi(fields: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []


def peak_rates(device: str, threads: int) -> dict[str, float]:
    """Measure PyTorch's peak rates: operations per second in matrix products by dtype, bytes read and written per second in a copy.

    Run it in a separate process.
    """
    import torch

    torch.set_num_threads(threads)
    side, dtypes = (1536, ("float32", "bfloat16")) if device == "cpu" else (8192, ("float32", "float16", "bfloat16"))

    def best(run: Callable[[], object], least_s: float = 1.0) -> float:
        run()
        times: list[float] = []
        while sum(times) < least_s:
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    found = {}
    with torch.inference_mode():
        for name in dtypes:
            a, b = (torch.randn(side, side, device=device).to(getattr(torch, name)) for _ in range(2))
            found[f"{name}_flop_per_s"] = 2 * side**3 / best(lambda a=a, b=b: a @ b)  # type: ignore[misc]  # bound now
        source = torch.ones(256 << 20, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        found["copy_bytes_per_s"] = 2 * source.numel() / best(lambda: target.copy_(source))
    return found
