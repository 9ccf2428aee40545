"""What this machine reaches in float32 matrix products and in copying, both with NumPy on the CPU.

Every thread multiplies matrices of its own: a product shared by all waits, wherever another process has one of the cores, for that core.

Run as a program of its own, ``python bench_peak.py THREADS``, with the BLAS library told in the environment to use no threads: it cannot be told once NumPy
is imported. Nor is what it takes of memory the benchmark's. It prints one JSON document, and needs nothing of this package.
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

SIZE = 1024  # of the matrices, SIZE x SIZE
COPIED_BYTES = 256_000_000
TRY_S = 0.02  # long beside what it takes to start threads, short enough to fall between what others do
ALL_TRIES_S, LEAST_TRIES = 0.6, 8
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
TIMEOUT_S = 120


def measure_apart(threads: int) -> dict[str, float | str]:
    """Measure in a process of its own with so many threads; see ``main`` for what it gives. Raises OSError, saying why it cannot be done."""
    if not sys.executable:
        raise OSError("this process does not know which Python runs it")
    environment = {**os.environ, **dict.fromkeys(BLAS_THREADS, "1")}
    try:
        done = subprocess.run([sys.executable, "-P", __file__, str(threads)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment)
        if done.returncode:
            raise OSError(f"its process ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
        measured: dict[str, float | str] = json.loads(done.stdout)
    except (subprocess.SubprocessError, json.JSONDecodeError) as error:
        raise OSError(f"its process failed: {error}") from error
    return measured


def main(threads: int) -> dict[str, float | str]:
    """``product_gflops``, ``copy_gb_per_second`` (10^9 bytes, those read and those written), and what multiplied, ``by``."""
    library = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return {
        "product_gflops": product_rate(SIZE, threads) / 1e9,
        "copy_gb_per_second": copy_rate(threads) / 1e9,
        "by": f"numpy {np.__version__} with {library.get('name', 'an unknown BLAS')} {library.get('version', '')}".strip(),
    }


def product_rate(size: int, threads: int) -> float:
    """Operations a second of all threads together, in the fastest of several tries."""
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((size, size), np.float32) for _ in range(2))

    alone = min(_seconds(lambda: np.matmul(a, b)) for _ in range(3))
    products = max(round(TRY_S / alone), 1)

    def multiply(product: NDArray[np.float32]) -> None:
        for _ in range(products):
            np.matmul(a, b, out=product)

    return threads * products * 2 * size**3 / _fastest(multiply, [np.empty_like(a) for _ in range(threads)])


def copy_rate(threads: int) -> float:
    """Bytes read and written a second, in the fastest of several tries; each thread copies a part."""
    source = np.ones(COPIED_BYTES // 4, np.float32)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    return 2 * source.nbytes / _fastest(lambda part: np.copyto(*part), parts)


def _fastest(work: Callable[[Any], None], items: Sequence[Any]) -> float:
    """Seconds that a thread for each item takes until all are done, in the fastest try."""
    times: list[float] = []
    with ThreadPoolExecutor(len(items)) as pool:
        list(pool.map(work, items))  # threads start, pages are had
        while len(times) < LEAST_TRIES or sum(times) < ALL_TRIES_S:
            times.append(_seconds(lambda: list(pool.map(work, items))))
    return min(times)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(int(sys.argv[1]))))
