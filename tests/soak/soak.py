"""Soak test: many threads use Generators in every way for minutes. A seed must always give the same image, everything must finish, and memory must not grow.

    MALLOC_ARENA_MAX=1 python tests/soak/soak.py 600        600 seconds, 8 threads; results go to benchmarks/results/soak.json

Covers calls, futures, asyncio, streams, cancellation, callbacks that raise, Generators that are opened, closed and dropped during use, and evaluations that
fail. Each thread expects only the errors that it provokes; any other error ends the run. If a thread makes no progress for a minute, it has deadlocked, and
all stacks are printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import hashlib
import os
import random
import statistics
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scm_runtime import (
    GenerationCancelledError,
    Generator,
    GeneratorClosedError,
    InferenceError,
    InvalidArgumentError,
    NonFiniteError,
    OutOfMemoryError,
    Samples,
)

SEEDS = range(-8, 24)
STUCK_S = 60.0
ROUNDS = 60  # after each round all threads pause, and memory is measured
PEAKS, PEAK = 25, 8  # warm-up rounds in which all threads generate PEAK samples, twice as many as later
WARMING_S = 60.0  # memory may grow in this time: arenas, threads
FLAT = 0.01  # maximum growth of memory after that, as a fraction
FAILING = 0.2  # fraction of failing evaluations of a Generator that is made to fail
PAGE = os.sysconf("SC_PAGE_SIZE")


class MischiefError(Exception):
    """Raised only by the callbacks of this test."""


@dataclass
class Soak:
    """A soak run. Started by ``main`` and by test_soak.py."""

    seconds: float
    threads: int = 8
    reopening: bool = True
    """Also open, close and drop Generators during the run, and make them fail."""
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Tracebacks of unexpected errors."""
    resident: list[tuple[float, float]] = field(default_factory=list)
    """Samples of resident memory: (seconds since the start, MB)."""
    threads_left: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._stop, self._go = threading.Event(), threading.Event()
        self._go.set()
        self._resting = 0
        self._progress = [time.monotonic()] * self.threads
        self._before = set(threading.enumerate())
        self._known: dict[tuple[int, int], str] = {}
        self._shared = self._open()
        # Smallest batch. ONNX Runtime's ReduceMean rounds differently at batch 1, which changes the result if the kernels do not run.
        self._least = 1 if self._shared.info.native_ops else 2
        for steps in (1, 2):
            drawn = self._shared(seed=SEEDS.start, batch_size=len(SEEDS), num_inference_steps=steps, output_type="np")
            self._known |= {(seed, steps): digest(pixels) for seed, pixels in zip(drawn.seeds, drawn.array, strict=True)}

    def run(self) -> None:
        """Run until the time is over or an error occurs."""
        workers = [threading.Thread(target=self._work, args=(i,), name=f"soak-{i}", daemon=True) for i in range(self.threads)]
        self._reach_peak()
        start = time.monotonic()
        for worker in workers:
            worker.start()
        try:
            while (now := time.monotonic()) - start < self.seconds and not self.wrong:
                if now - min(self._progress) < STUCK_S / 2:
                    faulthandler.dump_traceback_later(STUCK_S, exit=True)
                self._stop.wait(self.seconds / ROUNDS)
                self._rest()
                self.resident.append((time.monotonic() - start, resident_mb()))
                self._go.set()
            self._stop.set()
            self._go.set()
            faulthandler.dump_traceback_later(STUCK_S, exit=True)
            for worker in workers:
                worker.join()
        finally:
            faulthandler.cancel_dump_traceback_later()
        self._shared.close()
        deadline = time.monotonic() + 10
        while (left := [thread.name for thread in set(threading.enumerate()) - self._before]) and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
        self.threads_left = left

    def _reach_peak(self) -> None:
        """Allocate the memory that the coming load can need.

        ONNX Runtime never releases memory. Without this, memory would grow every few minutes, whenever more evaluations than before coincide.
        """
        with ThreadPoolExecutor(self.threads) as pool:
            for i in range(PEAKS):
                list(pool.map(lambda n: self._shared(seed=0, batch_size=PEAK + n % 2, output_type="np"), range(i, i + self.threads)))

    def _rest(self) -> None:
        """Wait until every thread has finished its current operation, so that only lasting memory is resident."""
        self._go.clear()
        while self._resting < self.threads and not self._stop.is_set():
            time.sleep(0.001)
        gc.collect()

    def growth(self) -> float:
        """Return the growth of resident memory from the second minute to the last one, as a fraction of the medians."""
        second = [mb for at, mb in self.resident if WARMING_S <= at < 2 * WARMING_S]
        last = [mb for at, mb in self.resident if at >= max(2 * WARMING_S, self.resident[-1][0] - WARMING_S)]
        return statistics.median(last) / statistics.median(second) - 1 if second and last else 0.0

    def figures(self) -> dict[str, Any]:
        """Return the results to record."""
        return {
            "seconds": round(self.resident[-1][0]),
            "threads": self.threads,
            "counts": dict(sorted(self.counts.items())),
            "images_per_second": round(self.counts["images"] / self.resident[-1][0], 1),
            "resident_mb": [round(mb, 1) for _, mb in self.resident],
            "growth_after_the_first_minute": round(self.growth(), 5),
            "threads_left": self.threads_left,
            "wrong": self.wrong,
        }

    # -- Threads ---------------------------------------------------------------------------------------------------------------------------------------------

    def _work(self, index: int) -> None:
        rng = random.Random(index)
        ways: Sequence[tuple[int, Callable[[random.Random], None]]] = (
            (20, self._call),
            (20, self._submit),
            (10, self._cancel),
            (8, self._asyncio),
            (6, self._stream),
            (4, self._callbacks),
            (4, self._bad_input),
            (2 * self.reopening, self._reopen),
            (1 * self.reopening, self._replace_shared),
        )
        weights = [weight for weight, _ in ways]
        try:
            while not self._stop.is_set():
                if not self._go.is_set():
                    self._count_resting(1)
                    self._go.wait()
                    self._count_resting(-1)
                way = rng.choices([way for _, way in ways], weights)[0]
                try:
                    way(rng)
                except GeneratorClosedError:
                    self._count("closed meanwhile")  # another thread has replaced the shared Generator
                self._count(way.__name__.strip("_"))
                self._progress[index] = time.monotonic()
        except BaseException:  # noqa: BLE001 - any error is recorded as the result
            self.wrong.append(traceback.format_exc())
            self._stop.set()

    def _call(self, rng: random.Random) -> None:
        kind: Any = rng.choice(["np", "pil", "latent", "dlpack"])
        arguments = self._arguments(rng)
        samples = self._shared(**arguments, output_type=kind)
        if kind != "latent":
            self._check(samples, arguments)
        if kind == "pil":
            assert len(samples.images) == len(samples)

    def _submit(self, rng: random.Random) -> None:
        requests = [self._arguments(rng) for _ in range(rng.randint(1, 6))]
        for future, arguments in [(self._shared.submit(**arguments, output_type="np"), arguments) for arguments in requests]:
            self._check(future.result(), arguments)

    def _cancel(self, rng: random.Random) -> None:
        requests = [self._arguments(rng) for _ in range(4)]
        pending = [(self._shared.submit(**arguments, output_type="np"), arguments) for arguments in requests]
        time.sleep(rng.random() * 0.01)
        cancelled = {future for future, _ in pending if rng.random() < 0.5 and future.cancel()}
        for future, arguments in pending:
            if future in cancelled:
                assert future.cancelled()
                self._count("cancelled")
            else:
                self._check(future.result(), arguments)

    def _asyncio(self, rng: random.Random) -> None:
        requests = [self._arguments(rng) for _ in range(3)]

        async def main() -> None:
            tasks = [asyncio.ensure_future(self._shared.async_(**arguments, output_type="np")) for arguments in requests]
            await asyncio.sleep(rng.random() * 0.005)
            if rng.random() < 0.5:
                tasks[0].cancel()
            for drawn, arguments in zip(await asyncio.gather(*tasks, return_exceptions=True), requests, strict=True):
                if isinstance(drawn, asyncio.CancelledError):
                    self._count("tasks cancelled")
                elif isinstance(drawn, BaseException):
                    raise drawn
                else:
                    self._check(drawn, arguments)

        asyncio.run(main())

    def _stream(self, rng: random.Random) -> None:
        start, size = rng.choice(SEEDS), rng.randint(self._least, 5)
        stop = rng.randrange(6)
        batches = self._shared.stream((SEEDS.stop - start) // self._least * self._least or self._least, size, seed=start, output_type="np")
        with contextlib.closing(batches):
            for i, samples in enumerate(batches):
                if len(samples) >= self._least:
                    self._check(samples, {"num_inference_steps": 2})
                if i == stop:
                    return

    def _callbacks(self, rng: random.Random) -> None:
        kind, arguments = rng.choice(["raises", "false", "halves", "submits"]), self._arguments(rng)
        expected = {"raises": (MischiefError,), "false": (GenerationCancelledError,)}.get(kind, ())
        inner: list[Future[Samples]] = []

        def callback(generator: Generator, step: int, t: float, state: dict[str, Any]) -> Any:
            if kind == "raises":
                raise MischiefError
            if kind == "submits":
                inner.append(generator.submit(**arguments, output_type="np"))
            return {"false": False, "halves": {"latents": state["latents"] * 0.5}}.get(kind)

        try:
            if rng.random() < 0.5:
                self._shared(**arguments, callback_on_step_end=callback)
            else:
                self._shared.submit(**arguments, callback_on_step_end=callback).result()
        except expected:
            self._count("ended by a callback")
        for future in inner:
            self._check(future.result(), arguments)

    def _bad_input(self, rng: random.Random) -> None:
        generator = self._shared
        hopeless = np.full((2, *generator.manifest.sample.shape), 3e38, np.float32)
        for call in (generator, lambda **arguments: generator.submit(**arguments).result()):
            try:
                call(seed=1, latents=hopeless)
            except NonFiniteError:
                self._count("not finite")
            else:
                raise AssertionError("samples were not finite, and no error was raised")
            with contextlib.suppress(InvalidArgumentError):
                call(class_labels=99)
                raise AssertionError("class 99 does not exist, and no error was raised")

    def _reopen(self, rng: random.Random) -> None:
        """Open a Generator whose evaluations may fail, and close or drop it while requests run."""
        generator = self._open()
        assert generator._loop.resource is not None
        graphs: Any = generator._loop.resource.engine.graphs()
        graphs.step = Flaky(graphs.step, rng)
        del graphs
        pending = []
        for _ in range(6):
            arguments = self._arguments(rng)
            pending.append((generator.submit(**arguments, output_type="np"), arguments))
        closed = rng.random() < 0.5
        if closed:
            generator.close()
        del generator
        for future, arguments in pending:
            try:
                self._check(future.result(), arguments)
            except GeneratorClosedError:
                assert closed
                self._count("refused at close")
            except InferenceError as error:
                if "made to fail" not in str(error):
                    raise
                self._count("made to fail")

    def _replace_shared(self, rng: random.Random) -> None:
        new = self._open()
        with self._lock:
            old, self._shared = self._shared, new
        old.close()

    def _arguments(self, rng: random.Random) -> dict[str, Any]:
        n = rng.randint(self._least, 4)
        return {"seed": [rng.choice(SEEDS) for _ in range(n)], "num_inference_steps": rng.choice([1, 2])}

    def _check(self, samples: Samples, arguments: dict[str, Any]) -> None:
        for seed, pixels in zip(samples.seeds, samples.array, strict=True):
            assert digest(pixels) == self._known[seed, arguments["num_inference_steps"]], f"seed {seed} gave another image"
        self._count("images", len(samples))

    def _count(self, what: str, n: int = 1) -> None:
        with self._lock:
            self.counts[what] += n

    def _count_resting(self, n: int) -> None:
        with self._lock:
            self._resting += n

    @staticmethod
    def _open() -> Generator:
        return Generator("digits", threads=1, max_batch_size=8, max_wait_ms=random.choice([0.0, 1.0]), verify_integrity=False)


class Flaky:
    """A session that fails randomly, as it would without memory."""

    def __init__(self, session: Any, rng: random.Random) -> None:
        self._session, self._rng = session, random.Random(rng.random())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def __call__(self, **inputs: Any) -> Any:
        if self._rng.random() < FAILING:
            raise self._rng.choice([InferenceError, OutOfMemoryError])("made to fail")
        return self._session(**inputs)


def digest(pixels: Any) -> str:
    """Return the SHA-256 of an image's pixels."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def resident_mb() -> float:
    """Return the resident memory of this process in MB, without freed memory that the C library keeps, which depends on the timing of the threads."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


def main() -> None:
    """Run as a program. Arguments: seconds and threads."""
    numbers = [float(argument) for argument in sys.argv[1:]]
    seconds, threads = numbers[0] if numbers else 600.0, int(numbers[1]) if len(numbers) > 1 else 8
    figures, failures = {}, []
    for name, reopening in {"one Generator": False, "Generators opened, closed and made to fail under way": True}.items():
        soak = Soak(seconds, threads, reopening)
        soak.run()
        figures[name] = soak.figures()
        failures += soak.wrong
        if soak.threads_left:
            failures.append(f"{name}: threads left: {soak.threads_left}")
        if not reopening and soak.growth() > FLAT:  # new Generators have arenas of other sizes, which depend on coinciding evaluations
            failures.append(f"{name}: memory grew by {soak.growth():.2%}")
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    from _common import save_and_print

    save_and_print("soak", figures)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
