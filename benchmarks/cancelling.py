"""How long does it take to end a running step? Seconds from each way of ending it until the Generator is free again, for a step of ten seconds on the CPU.

The step is a chain of products of 1024x1024 matrices, which ends between two products. For Ctrl-C and a timeout, the time is that until the call returns; for
a future, a task and a stream, until another request is served; for ``close``, until it returns; for the exit of the process, until the process has ended.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from _common import AGAIN, Cells

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import toy_bundle
from scm_runtime import GenerationTimeoutError, Generator

ROUNDS = 5
STEP_S = 10.0  # how long a step would take that is not ended
RUNNING_S = 1.0  # how long it runs before it is ended
BASE = 1000.0  # a step computes as many products as the guidance scale is above this

STEP = toy_bundle.STEP.replace(
    "    x_next = Add(abcd, gt4)\n",
    """
    base = Constant<value_float=1000.0>()
    most = ReduceMax<keepdims=0>(guidance_scale)
    above = Sub(most, base)
    positive = Relu(above)
    trips = Cast<to=7>(positive)
    nothing = Constant<value_float=0.0>()
    zero = Mul(positive, nothing)
    entry = Constant<value_float=0.0009765625>()
    shifted = Add(zero, entry)
    size = Constant<value_ints=[1024, 1024]>()
    matrix = Expand(shifted, size)
    go = Constant<value_int=1>()
    going = Cast<to=9>(go)
    product = Loop(trips, going, matrix) <body = chain (int64 lap, bool on, float[1024,1024] value) => (bool still, float[1024,1024] next) {
        still = Identity(on)
        next = MatMul(value, matrix)
    }>
    all_entries = ReduceSum<keepdims=0>(product)
    all_nothing = Mul(all_entries, nothing)
    whole = Add(abcd, gt4)
    x_next = Add(whole, all_nothing)
""",
)
FAST: dict[str, Any] = {"prompt_embeds": np.ones((2, toy_bundle.WIDTH), np.float32), "seed": 1, "output_type": "latent", "num_inference_steps": 1}

EXIT = """
import sys, threading, time
import numpy as np
from scm_runtime import Generator

bundle, guidance, width = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
generate = Generator(bundle, device="cpu")
if guidance:
    arguments = {"prompt_embeds": np.ones((2, width), np.float32), "guidance_scale": guidance}
    threading.Thread(target=lambda: generate(**arguments), daemon=True).start()
    time.sleep(1.0)
print(time.monotonic(), flush=True)
"""


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def at_interrupt(generate: Generator, slow: dict[str, Any]) -> float:
    """Ctrl-C in a call of the main thread."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(RUNNING_S, send)
    timer.start()
    try:
        generate(**slow)
    except KeyboardInterrupt:
        return time.monotonic() - sent[0]
    raise AssertionError("the call was not interrupted")


def at_cancelled_future(generate: Generator, slow: dict[str, Any]) -> float:
    """``cancel()`` of a future."""
    future = generate.submit(**slow)
    time.sleep(RUNNING_S)
    start = time.monotonic()
    assert future.cancel()
    generate.submit(**FAST).result()
    return time.monotonic() - start


def at_cancelled_task(generate: Generator, slow: dict[str, Any]) -> float:
    """``cancel()`` of an asyncio task."""

    async def main() -> float:
        task = asyncio.ensure_future(generate.async_(**slow))
        await asyncio.sleep(RUNNING_S)
        start = time.monotonic()
        task.cancel()
        await asyncio.wait([task])
        await generate.async_(**FAST)
        return time.monotonic() - start

    return asyncio.run(main())


def at_closed_stream(generate: Generator, slow: dict[str, Any]) -> float:
    """Closing a stream whose second batch is computed ahead."""
    scales = [1.0, slow["guidance_scale"]]
    stream = generate.stream(2, 1, **{**FAST, "guidance_scale": scales})
    next(stream)
    time.sleep(RUNNING_S)
    start = time.monotonic()
    stream.close()
    generate.submit(**FAST).result()
    return time.monotonic() - start


def at_timeout(generate: Generator, slow: dict[str, Any]) -> float:
    """The ``timeout`` of a call."""
    start = time.monotonic()
    try:
        generate(**slow, timeout=RUNNING_S)
    except GenerationTimeoutError:
        return time.monotonic() - start - RUNNING_S
    raise AssertionError("the call did not end at its timeout")


def at_close(generate: Generator, slow: dict[str, Any]) -> float:
    """``close()`` of the Generator."""
    generate.submit(**slow)
    time.sleep(RUNNING_S)
    start = time.monotonic()
    generate.close()
    return time.monotonic() - start


def at_exit(bundle: Path, guidance: float) -> float:
    """The exit of a process, during a step, or with an idle Generator if ``guidance`` is 0."""
    command = [sys.executable, "-c", EXIT, str(bundle), str(guidance), str(toy_bundle.WIDTH)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        start = float(process.stdout.readline())
        assert process.wait() == 0
        return time.monotonic() - start


WAYS: dict[str, Callable[[Generator, dict[str, Any]], float]] = {
    "ctrl_c": at_interrupt,
    "future_cancel": at_cancelled_future,
    "task_cancel": at_cancelled_task,
    "stream_close": at_closed_stream,
    "timeout": at_timeout,
}


def opened(bundle: Path) -> Generator:
    """Return a Generator whose requests share no step."""
    return Generator(bundle, device="cpu", max_batch_size=1)


def guidance_of_a_long_step(generate: Generator) -> float:
    """Return the guidance scale with which a step takes STEP_S."""
    products = 20
    generate(**FAST, guidance_scale=BASE + products)
    start = time.monotonic()
    generate(**FAST, guidance_scale=BASE + products)
    return BASE + round(products * STEP_S / (time.monotonic() - start))


def measure_way(bundle: Path, way: Callable[[Generator, dict[str, Any]], float], slow: dict[str, Any]) -> dict[str, float]:
    """Return the seconds until the Generator is free, those of the call that follows, and the growth of the process's memory in MB."""
    expected = toy_bundle.sample([1], FAST["prompt_embeds"], steps=1)
    seconds: list[float] = []
    next_call_s: list[float] = []
    with opened(bundle) as generate:
        generate.submit(**FAST, guidance_scale=BASE + 2).result()
        before = resident_mb()
        for _ in range(ROUNDS):
            seconds.append(way(generate, slow))
            start = time.monotonic()
            np.testing.assert_allclose(generate(**FAST).array, expected, atol=1e-6)
            next_call_s.append(time.monotonic() - start)
        grown = resident_mb() - before
    return {"median_s": median(seconds), "max_s": max(seconds), "next_call_max_s": max(next_call_s), "resident_grown_mb": grown}


def repeated(measure: Callable[[], float]) -> dict[str, float]:
    """Return median and maximum of several rounds."""
    seconds = [measure() for _ in range(ROUNDS)]
    return {"median_s": median(seconds), "max_s": max(seconds)}


@click.command(help=__doc__.split("\n")[0])
@AGAIN
def main(again: bool) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore Ctrl-C
    cells = Cells("cancelling", again=again)
    with tempfile.TemporaryDirectory() as folder:
        bundle = toy_bundle.write_text_bundle(Path(folder) / "slow.scm", graphs={"step": STEP})
        with opened(bundle) as generate:
            guidance = guidance_of_a_long_step(generate)
        # Two samples: a call of the main thread with the sizes of a fast one would be computed in that thread, where Ctrl-C waits for the end of the graph.
        slow = {**FAST, "seed": [1, 2], "guidance_scale": guidance}
        for name, way in WAYS.items():
            cells.measure(name, by=partial(measure_way, bundle, way, slow))
        cells.measure("close", by=lambda: repeated(lambda: at_close(opened(bundle), slow)))
        cells.measure("exit", by=lambda: repeated(lambda: at_exit(bundle, guidance)))
        cells.measure("exit_idle", by=lambda: repeated(lambda: at_exit(bundle, 0.0)))


if __name__ == "__main__":
    main()
