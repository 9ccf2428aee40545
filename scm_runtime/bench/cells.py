"""Measurement of a benchmark's cells: one number of steps with one batch size each. Cells are measured in turns, in rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bench.result import Cell, MachinePeak, ModelCost
from scm_runtime.errors import InferenceError
from scm_runtime.generator import Generator
from scm_runtime.inputs.conditioning import placeholder_conditioning
from scm_runtime.samples import Timings

ROUND_S = 0.1  # time of one cell in a round, but at least one call
SHORT_S = 0.05  # a cell with shorter calls begins each round with a discarded one: the previous cell has filled the caches
MIN_RUNS = 3
PARTS = ("noise", "steps", "decode", "copy")

Progress = Callable[[str, float], None]
"""Called with the current activity and the completed share of all measurements, from 0 to 1."""


@dataclass(eq=False)
class CellRun:
    """The measurements of one cell."""

    generator: Generator
    steps: int
    batch_size: int
    arguments: dict[str, Any]
    times: list[float] = field(default_factory=list)
    """Seconds of each call."""
    parts: list[Timings] = field(default_factory=list)
    first: float | None = None
    """Seconds of the first call."""
    evaluations: int | None = None
    conditioning: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Conditioning of one sample, as the graphs read it."""
    error: str | None = None

    @property
    def name(self) -> str:
        """Steps and batch size, for the progress bar."""
        return f"{self.steps} step{'s' * (self.steps > 1)}, batch {self.batch_size}"

    def call(self, *, keep: bool) -> None:
        """Make one call, and keep its times if ``keep``. A failure of the graphs or of memory sets ``error``."""
        try:
            start = time.perf_counter()
            samples = self.generator(**self.arguments)
            seconds = time.perf_counter() - start
        except (InferenceError, MemoryError) as error:
            self.error = str(error) or "out of memory"
            return
        if self.first is None:
            self.first, self.evaluations = seconds, len(samples.timings.steps)
            self.conditioning = {name: values[:1].copy() for name, values in samples.conditioning.items()}
        if keep:
            self.times.append(seconds)
            self.parts.append(samples.timings)

    def warm_up(self) -> None:
        """Create the arguments and make the first call, which allocates memory and captures a CUDA graph for exactly this batch size."""
        try:
            seeds = range(self.batch_size)
            self.arguments["conditioning"] = placeholder_conditioning(self.generator.manifest.conditioning, seeds)
        except MemoryError as error:
            self.error = str(error) or "out of memory"
        if self.error is None:
            self.generator._keep_batch_size(self.batch_size)
            self.call(keep=False)

    def measure_round(self, seconds: float) -> None:
        """Make the calls of one round. ``seconds`` is the time to measure over all rounds."""
        if (self.times[-1] if self.times else cast(float, self.first)) < SHORT_S:
            self.call(keep=False)
        end = time.perf_counter() + ROUND_S
        while not self.done(seconds):
            self.call(keep=True)
            if time.perf_counter() >= end:
                return

    def done(self, seconds: float) -> bool:
        """Return True if the cell failed or was measured for ``seconds``."""
        return self.error is not None or (len(self.times) >= MIN_RUNS and sum(self.times) >= seconds)

    def completed(self, seconds: float) -> float:
        """Completed share of the cell's measurement, from 0 to 1."""
        return 1.0 if self.done(seconds) else min(sum(self.times) / seconds, 1.0) if seconds else 0.0


def measure(runs: Sequence[CellRun], seconds: float, progress: Progress, after_round: Callable[[], None]) -> None:
    """Warm up all cells, then measure them in turns until each was measured for ``seconds``. ``after_round`` is called after each cell's turn."""
    for run in sorted(runs, key=lambda run: -run.batch_size):  # the largest first: it allocates the memory that the others reuse
        progress(f"first call: {run.name}", 0)
        run.warm_up()
        after_round()
    while unfinished := [run for run in runs if not run.done(seconds)]:
        for run in unfinished:
            progress(run.name, sum(each.completed(seconds) for each in runs) / len(runs))
            run.measure_round(seconds)
            after_round()


def summarize(run: CellRun, cost: ModelCost, peak: MachinePeak) -> Cell:
    """Compute a cell's figures from its measurements."""
    if run.error is not None or not run.times:
        return Cell(steps=run.steps, batch_size=run.batch_size, evaluations=run.evaluations, error=run.error)
    median = float(np.median(run.times))
    evaluations = cast(int, run.evaluations)
    gflops = None
    if cost.step_gflop is not None:
        gflops = run.batch_size * (evaluations * cost.step_gflop + (cost.decode_gflop or 0)) / median
    moved = evaluations * cost.weight_bytes / 1e9 / median if cost.weight_bytes else None
    parts = {"steps": [sum(part.steps) for part in run.parts], **{name: [getattr(part, name) for part in run.parts] for name in PARTS if name != "steps"}}
    return Cell(
        steps=run.steps,
        batch_size=run.batch_size,
        runs=len(run.times),
        evaluations=evaluations,
        first_ms=None if run.first is None else run.first * 1e3,
        median_ms=median * 1e3,
        p95_ms=float(np.percentile(run.times, 95)) * 1e3,
        min_ms=min(run.times) * 1e3,
        images_per_second=run.batch_size / median,
        parts_ms={name: float(np.median(parts[name])) * 1e3 for name in PARTS},
        gflops=gflops,
        matmul_share=gflops / peak.matmul_gflops if gflops is not None and peak.matmul_gflops else None,
        weights_gb_per_second=moved,
        copy_share=moved / peak.copy_gb_per_second if moved is not None and peak.copy_gb_per_second else None,
    )
