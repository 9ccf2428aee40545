"""The machine's peak in matrix products and in copying, measured on the CPU or on a GPU."""

from __future__ import annotations

import msgspec

from scm_runtime.bench.result import MachinePeak
from scm_runtime.bundle.manifest import Dtype
from scm_runtime.devices.cpu import available_cores
from scm_runtime.devices.placement import Placement
from scm_runtime.errors import ScmError


def measure_cpu_peak(threads: int | None) -> MachinePeak:
    """Measure the CPU with a number of threads; None for one per core."""
    from scm_runtime.bench.cpu_peak import COPIED_BYTES, SIZE, measure_in_subprocess

    count = min(threads or available_cores(), available_cores())
    try:
        found = measure_in_subprocess(count)
    except OSError as error:
        return MachinePeak(reason=str(error))
    threaded = f"{count} threads" if count > 1 else "one thread"
    how = f"float32 products {SIZE} x {SIZE} by {found['library']}, np.copyto of {COPIED_BYTES / 1e6:.0f} MB; {threaded}; the best, before and after the cells"
    return MachinePeak(matmul_gflops=float(found["matmul_gflops"]), copy_gb_per_second=float(found["copy_gb_per_second"]), how=how)


def measure_gpu_peak(placement: Placement, dtype: Dtype) -> MachinePeak:
    """Measure a GPU, with matrix products in a dtype."""
    from scm_runtime.bench.gpu_peak import COPIED_BYTES, SIZE, copy_rate, matmul_rate

    size = SIZE[dtype]
    try:
        product, copied = matmul_rate(placement, dtype, size), copy_rate(placement, COPIED_BYTES)
    except ScmError as error:
        return MachinePeak(reason=str(error))
    how = f"{dtype} product {size} x {size} and negation of {COPIED_BYTES / 1e6:.0f} MB by ONNX Runtime; the best, after all cells"
    return MachinePeak(matmul_gflops=product / 1e9, copy_gb_per_second=copied / 1e9, how=how)


def best_of(one: MachinePeak, two: MachinePeak) -> MachinePeak:
    """Return the higher of two measurements, for each figure."""
    if one.matmul_gflops is None or two.matmul_gflops is None:
        return one if two.matmul_gflops is None else two
    best = {name: max(getattr(one, name), getattr(two, name)) for name in ("matmul_gflops", "copy_gb_per_second")}
    return msgspec.structs.replace(one, **best)
