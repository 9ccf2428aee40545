"""What is the overhead of the host code? Four questions, on the CPU.

"call": how much longer does a call of a Generator take than its graphs, that is the same sessions on the same inputs in a bare loop? By number of steps, on
    the main thread and on another.
"threads": do eight threads that share one Generator finish sooner than one thread that makes eight calls?
"clients": sixteen clients, each requesting one sample after another, by calls and by ``submit``: samples per second, and latency.
"memory": the peak resident memory of a separate process.

``--seconds`` is the duration for each kind of client and bundle; longer gives more stable percentiles. ``--only-call`` answers the first question in seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from _common import Cells, interleaved
from _peers.models import DIGITS, edm2_config, random_checkpoint

from scm_export import export
from scm_runtime import Generator, Samples
from scm_runtime.common.load_onnxruntime import load_onnxruntime

InferenceSession = load_onnxruntime().InferenceSession

CALLERS, CLIENTS = 8, 16
ROUNDS = 3  # in which the kinds of clients take turns
# Kinds of clients: direct calls (None), or submit with (max_wait_ms, max_batch_size).
MODES = {"calls": None} | {f"submit, max_wait_ms {wait}, max_batch_size {size}": (wait, size) for wait in (0, 2) for size in (8, 16)}
Request = Callable[[int], Samples]  # requests one sample with this seed
MEMORY = """
import json, sys, time
import numpy, onnxruntime
def peak():  # not ru_maxrss, which begins with the size of the process that started this one
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
figures = {"numpy + onnxruntime": peak()}
from scm_runtime import Generator
generate = Generator(sys.argv[1], max_batch_size=8, cache_dir=False)
figures["opened"] = peak()
for n in (1, 8):
    generate(0, seed=0, batch_size=n, output_type="np")
    figures[f"batch {n}"] = peak()
for samples in generate.stream(int(sys.argv[2]), 8, seed=0, output_type="np"):
    pass
figures[f"stream of {sys.argv[2]}, 8 at a time"] = peak()
print(json.dumps(figures))
"""


# ----------------------------------------------------------------------------
# A call, and only its graphs


def graphs_of(call: Callable[[], object]) -> Callable[[], Any]:
    """Return a loop over the ONNX Runtime calls that ``call`` makes: the same sessions and inputs, nothing else. It returns the output of the last graph."""
    runs, run = [], InferenceSession.run

    def record(session: Any, *arguments: Any) -> Any:
        runs.append((session, arguments))
        return run(session, *arguments)

    InferenceSession.run = record
    try:
        call()
    finally:
        InferenceSession.run = run

    def loop() -> Any:
        for session, arguments in runs:
            outputs = run(session, *arguments)
        return outputs[0]

    return loop


def call_overhead(bundle: Path | str, repeats: int) -> dict[str, Any]:
    found = {}
    with Generator(bundle, threads=1) as generate, ThreadPoolExecutor(1) as pool:  # one thread of ONNX Runtime, to measure the Python code
        for steps in (1, 2):
            call = partial(generate, 0, seed=7, num_inference_steps=steps, output_type="np")
            bare = graphs_of(call)
            np.testing.assert_array_equal(call().array, bare())
            measure = partial(interleaved, {"graphs": bare, "call": call}, repeats, warmup=50)
            for name, times in {f"{steps} steps": measure(), f"{steps} steps, another thread": pool.submit(measure).result()}.items():
                found[name] = {**times, **{f"call - graphs, {kind}": times["call"][kind] - times["graphs"][kind] for kind in ("median_ms", "min_ms")}}
    return found


# ----------------------------------------------------------------------------
# Threads and clients


def measure_threads(bundle: Path, repeats: int) -> dict[str, Any]:
    def request(seed: int) -> Samples:
        return generate(0, seed=seed, output_type="np")

    with Generator(bundle) as generate, ThreadPoolExecutor(CALLERS) as pool:
        found = interleaved(
            {
                f"{CALLERS} calls in turn": lambda: [request(seed) for seed in range(CALLERS)],
                f"{CALLERS} threads": lambda: list(pool.map(request, range(CALLERS))),
                f"one call of {CALLERS}": lambda: generate(0, seed=0, batch_size=CALLERS, output_type="np"),
            },
            repeats,
        )
    return {**found, "in turn / threads": found[f"{CALLERS} calls in turn"]["median_ms"] / found[f"{CALLERS} threads"]["median_ms"]}


def run_clients(request: Request, seconds: float) -> tuple[list[float], float]:
    """Return the latencies of all requests in ms, and the time from the first request to the last result in seconds."""
    latencies: list[float] = []
    begin = threading.Barrier(CLIENTS + 1)

    def client(number: int) -> None:
        begin.wait()
        count = 0
        while (now := time.perf_counter()) < end:
            request(number * 1_000_000 + count)
            latencies.append((time.perf_counter() - now) * 1e3)
            count += 1

    clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in clients:
        thread.start()
    start = time.perf_counter()
    end = start + seconds
    begin.wait()
    for thread in clients:
        thread.join()
    return latencies, time.perf_counter() - start


def measure_clients(bundle: Path, seconds: float) -> dict[str, Any]:
    def open_for(stack: ExitStack, batching: tuple[int, int] | None) -> Request:
        if batching is None:
            generate = stack.enter_context(Generator(bundle))
            return lambda seed: generate(0, seed=seed, output_type="np")
        wait, size = batching
        merging = stack.enter_context(Generator(bundle, max_wait_ms=wait, max_batch_size=size))
        return lambda seed: merging.submit(0, seed=seed, output_type="np").result()

    with ExitStack() as stack:
        requests = {name: open_for(stack, batching) for name, batching in MODES.items()}
        latencies: Mapping[str, list[float]] = {name: [] for name in requests}
        spent = dict.fromkeys(requests, 0.0)
        for turn in range(ROUNDS + 1):  # the first turn is short, a warm-up
            for name, request in requests.items():
                found, took = run_clients(request, seconds / ROUNDS if turn else 0.5)
                if turn:
                    latencies[name].extend(found)
                    spent[name] += took
    return {name: {"samples_per_s": len(found) / spent[name], **_percentiles(found)} for name, found in latencies.items()}


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50_ms": cuts[49], "p99_ms": cuts[98], "requests": len(values)}


# ----------------------------------------------------------------------------


def peak_memory(bundle: Path, streamed: int) -> dict[str, float]:
    """Return the peak memory in MiB after each stage."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(bundle), str(streamed)], check=True, capture_output=True, text=True)
    return {name: round(value, 1) for name, value in json.loads(done.stdout).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--only-call", action="store_true", help="print the overhead of a call of the embedded model, and store nothing")
    parser.add_argument("--again", action="store_true", help="measure again what was measured before")
    chosen = parser.parse_args()
    if chosen.only_call:
        print(json.dumps(call_overhead("digits", 500), indent=2))
        return
    seconds, cells = chosen.seconds, Cells("host", again=chosen.again)
    digits, xxs = "digits 28x28", "XXS 32x32x4"
    with tempfile.TemporaryDirectory() as folder:

        @cache
        def bundle(name: str) -> Path:
            checkpoint = DIGITS if name == digits else random_checkpoint(edm2_config("XXS"), Path(folder) / "xxs.pt")
            return export(checkpoint, Path(folder) / f"{checkpoint.stem}.scm", verify=False, steps=()).path

        def measure(what: str, name: str, function: Callable[..., dict[str, Any]], argument: float) -> None:
            cells.measure(what, name, by=lambda: function(bundle(name), argument))

        measure("call", digits, call_overhead, 500)  # for larger graphs the noise is larger than the overhead
        for name, repeats, streamed in ((digits, 40, 1000), (xxs, 8, 64)):
            measure("threads", name, measure_threads, repeats)
            measure("clients", name, measure_clients, seconds)
            measure("memory, MiB", name, peak_memory, streamed)


if __name__ == "__main__":
    main()
