"""Many threads use Generators in every way at once, for minutes: does a seed always draw the same picture, does all end, does memory stay?

    MALLOC_ARENA_MAX=1 python tests/soak/soak.py 600        seconds; 8 threads; the figures go to benchmarks/results/soak.json

Calls, futures, asyncio, streams, cancellations, callbacks that raise, Generators opened, closed and dropped under way, evaluations that fail. Each thread
knows which errors it has asked for; any other ends the run. Whoever makes no progress for a minute has deadlocked: all stacks are printed.
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
ROUNDS = 60  # between which all rest, and memory is measured
PEAKS, PEAK = 25, 8  # how often all threads at once draw how many samples first: twice as many as later
WARMING_S = 60.0  # in which memory may grow: arenas, threads
FLAT = 0.01
FAILING = 0.2  # of the evaluations of a Generator that is made to fail
PAGE = os.sysconf("SC_PAGE_SIZE")


class MischiefError(Exception):
    """Raised by callbacks here, and by nothing else."""


@dataclass
class Soak:
    """A run; ``main`` and the test start it."""

    seconds: float
    threads: int = 8
    reopening: bool = True
    """Whether Generators are opened, closed and dropped under way, and made to fail."""
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """What should not have happened."""
    resident: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the start, MB."""
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
        # ONNX Runtime's ReduceMean rounds otherwise at batch 1, which shows where the kernels do not run.
        self._least = 1 if self._shared.info.native_ops else 2
        for steps in (1, 2):
            drawn = self._shared(seed=SEEDS.start, batch_size=len(SEEDS), num_inference_steps=steps, output_type="np")
            self._known |= {(seed, steps): digest(pixels) for seed, pixels in zip(drawn.seeds, drawn.array, strict=True)}

    def run(self) -> None:
        """Until the time is over or something is wrong."""
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
        """Take the memory that the load to come can need. ONNX Runtime keeps what it ever had, so that otherwise memory grows, once in minutes, when more
        evaluations than ever before happen to meet."""
        with ThreadPoolExecutor(self.threads) as pool:
            for i in range(PEAKS):
                list(pool.map(lambda n: self._shared(seed=0, batch_size=PEAK + n % 2, output_type="np"), range(i, i + self.threads)))

    def _rest(self) -> None:
        """Let every thread end what it does, so that what is resident then is what stays."""
        self._go.clear()
        while self._resting < self.threads and not self._stop.is_set():
            time.sleep(0.001)
        gc.collect()

    def growth(self) -> float:
        """Of resident memory from the minute after the first to the last, as a fraction; each by its median."""
        second = [mb for at, mb in self.resident if WARMING_S <= at < 2 * WARMING_S]
        last = [mb for at, mb in self.resident if at >= max(2 * WARMING_S, self.resident[-1][0] - WARMING_S)]
        return statistics.median(last) / statistics.median(second) - 1 if second and last else 0.0

    def figures(self) -> dict[str, Any]:
        """For the record."""
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

    # -- A thread --------------------------------------------------------------------------------------------------------------------------------------------

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
                    self._count("closed meanwhile")  # another thread has put a new one in its place
                self._count(way.__name__.strip("_"))
                self._progress[index] = time.monotonic()
        except BaseException:  # noqa: BLE001 - whatever it is, it is the result
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
                raise AssertionError("infinity was drawn")
            with contextlib.suppress(InvalidArgumentError):
                call(class_labels=99)
                raise AssertionError("there is no class 99")

    def _reopen(self, rng: random.Random) -> None:
        """One of its own, whose evaluations may fail; closed or dropped while requests run."""
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
            assert digest(pixels) == self._known[seed, arguments["num_inference_steps"]], f"seed {seed} drew another picture"
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
    """A session that fails now and then, as one does that has no memory."""

    def __init__(self, session: Any, rng: random.Random) -> None:
        self._session, self._rng = session, random.Random(rng.random())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def __call__(self, **inputs: Any) -> Any:
        if self._rng.random() < FAILING:
            raise self._rng.choice([InferenceError, OutOfMemoryError])("made to fail")
        return self._session(**inputs)


def digest(pixels: Any) -> str:
    """Of one picture."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def resident_mb() -> float:
    """Resident memory of this process, but for what the C library keeps of what was freed: that depends on which thread needed how much when."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


def main() -> None:
    """Run it as a program: the seconds, the threads."""
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
        if not reopening and soak.growth() > FLAT:  # another Generator's arenas have another size, by what met in them
            failures.append(f"{name}: memory grew by {soak.growth():.2%}")
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    from _common import keep

    keep("soak", figures)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
