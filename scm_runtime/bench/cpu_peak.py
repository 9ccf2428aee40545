"""Measure this machine's peak in float32 matrix products and in copying, with NumPy on the CPU.

Each thread multiplies its own matrices: a product shared by all threads would wait for any core that another process is using.

``measure_in_subprocess`` runs this file as a program, ``python cpu_peak.py THREADS``, with environment variables that tell the BLAS library to use one
thread, which is impossible once NumPy is imported; its memory does not count as the benchmark's either. It prints one JSON document and imports nothing of
this package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZE = 1024  # matrices are SIZE x SIZE
COPIED_BYTES = 256_000_000
TRY_S = 0.02  # long compared with the start of threads, short enough to fit between the activity of other processes
ALL_TRIES_S, MIN_TRIES = 0.6, 8
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
TIMEOUT_S = 120


def measure_in_subprocess(threads: int) -> dict[str, float | str]:
    """Return what ``main`` measures, in a process of its own. Raises OSError with the reason if it fails."""
    if not sys.executable:
        raise OSError("this process does not know which Python runs it")
    environment = {**os.environ, **dict.fromkeys(BLAS_THREADS, "1")}
    try:
        done = subprocess.run([sys.executable, "-P", __file__, str(threads)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment)
        if done.returncode:
            raise OSError(f"its process ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['no error message'])[-1]}")
        measured: dict[str, float | str] = json.loads(done.stdout)
    except (subprocess.SubprocessError, json.JSONDecodeError) as error:
        raise OSError(f"its process failed: {error}") from error
    return measured


def main(threads: int) -> dict[str, float | str]:
    """Measure with a number of threads: ``matmul_gflops``, ``copy_gb_per_second`` (10^9 bytes read and written), and the ``library`` that multiplied."""
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return {
        "matmul_gflops": matmul_rate(SIZE, threads) / 1e9,
        "copy_gb_per_second": copy_rate(threads) / 1e9,
        "library": f"numpy {np.__version__} with {blas.get('name', 'an unknown BLAS')} {blas.get('version', '')}".strip(),
    }


def matmul_rate(size: int, threads: int) -> float:
    """Floating point operations per second of all threads together, in the fastest of several tries."""
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((size, size), np.float32) for _ in range(2))

    one_product = min(_seconds(lambda: np.matmul(a, b)) for _ in range(3))
    products = max(round(TRY_S / one_product), 1)

    def multiply(product: NDArray[np.float32]) -> None:
        for _ in range(products):
            np.matmul(a, b, out=product)

    return threads * products * 2 * size**3 / _fastest(multiply, [np.empty_like(a) for _ in range(threads)])


def copy_rate(threads: int) -> float:
    """Bytes read and written per second, in the fastest of several tries; each thread copies a part."""
    source = np.ones(COPIED_BYTES // 4, np.float32)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    return 2 * source.nbytes / _fastest(lambda part: np.copyto(*part), parts)


def _fastest(work: Callable[[Any], None], items: Sequence[Any]) -> float:
    """Seconds to process all items with one thread each, in the fastest try."""
    times: list[float] = []
    with ThreadPoolExecutor(len(items)) as pool:
        list(pool.map(work, items))  # starts the threads and allocates memory
        while len(times) < MIN_TRIES or sum(times) < ALL_TRIES_S:
            times.append(_seconds(lambda: list(pool.map(work, items))))
    return min(times)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(int(sys.argv[1]))))
