"""The machine that a benchmark runs on: what it is, and what it reaches in a matrix product and in copying."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

import msgspec

from scm_runtime.bench.result import MachinePeak
from scm_runtime.bundle.manifest import Dtype
from scm_runtime.devices.placement import Placement
from scm_runtime.errors import ScmError


def cpu_peak(threads: int | None) -> MachinePeak:
    """Of the processor with so many threads; None: one a core."""
    from scm_runtime.bench.cpu_peak import COPIED_BYTES, SIZE, measure_apart

    count = min(threads or cores(), cores())
    try:
        found = measure_apart(count)
    except OSError as error:
        return MachinePeak(reason=str(error))
    threaded = f"{count} threads" if count > 1 else "one thread"
    how = f"float32 products {SIZE} x {SIZE} by {found['by']}, np.copyto of {COPIED_BYTES / 1e6:.0f} MB; {threaded}; the best, before and after the cells"
    return MachinePeak(product_gflops=float(found["product_gflops"]), copy_gb_per_second=float(found["copy_gb_per_second"]), how=how)


def gpu_peak(placement: Placement, dtype: Dtype) -> MachinePeak:
    """Of a GPU in a dtype."""
    from scm_runtime.bench.gpu_peak import COPIED_BYTES, SIZE, copy_rate, product_rate

    size = SIZE[dtype]
    try:
        product, copied = product_rate(placement, dtype, size), copy_rate(placement, COPIED_BYTES)
    except ScmError as error:
        return MachinePeak(reason=str(error))
    how = f"{dtype} product {size} x {size} and negation of {COPIED_BYTES / 1e6:.0f} MB by ONNX Runtime; the best, after all cells"
    return MachinePeak(product_gflops=product / 1e9, copy_gb_per_second=copied / 1e9, how=how)


def best_of(one: MachinePeak, two: MachinePeak) -> MachinePeak:
    """What the machine reached in either."""
    if one.product_gflops is None or two.product_gflops is None:
        return one if two.product_gflops is None else two
    best = {name: max(getattr(one, name), getattr(two, name)) for name in ("product_gflops", "copy_gb_per_second")}
    return msgspec.structs.replace(one, **best)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The name of the CPU, as far as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
