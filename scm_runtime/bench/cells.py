"""The cells of a benchmark: each makes its calls in turns with the others, and has its figures in the end."""

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

TURN_S = 0.1  # that a cell has before the next one's turn, but one call at least
SHORT_S = 0.05  # a turn of calls shorter than this begins with one that does not count: the cell before left the caches full of its own
LEAST_RUNS = 3
PARTS = ("noise", "steps", "decode", "copy")

Progress = Callable[[str, float], None]
"""Told what is done now, and which part of all measurements, from 0 to 1, is behind us."""


@dataclass(eq=False)
class CellRun:
    """A cell while it is measured."""

    generator: Generator
    steps: int
    batch_size: int
    arguments: dict[str, Any]
    times: list[float] = field(default_factory=list)
    parts: list[Timings] = field(default_factory=list)
    first: float | None = None
    evaluations: int | None = None
    conditioning: dict[str, NDArray[Any]] = field(default_factory=dict)
    error: str | None = None

    def call(self, *, keep: bool) -> None:
        """One call; what it raises for want of memory, or where the graphs fail, becomes ``error``."""
        try:
            start = time.perf_counter()
            samples = self.generator(**self.arguments)
            took = time.perf_counter() - start
        except (InferenceError, MemoryError) as error:
            self.error = str(error) or "out of memory"
            return
        if self.first is None:
            self.first, self.evaluations = took, len(samples.timings.steps)
            self.conditioning = {name: values[:1].copy() for name, values in samples.conditioning.items()}
        if keep:
            self.times.append(took)
            self.parts.append(samples.timings)

    def warm_up(self, calls: int) -> None:
        """Make its arguments and the first calls, which take memory and capture CUDA graphs."""
        try:
            seeds = range(self.batch_size)
            self.arguments["conditioning"] = placeholder_conditioning(self.generator.manifest.conditioning, seeds)
        except MemoryError as error:
            self.error = str(error) or "out of memory"
        for _ in range(calls):
            if self.error is None:
                self.call(keep=False)

    def measure_round(self, seconds: float) -> None:
        """Its calls of one round."""
        if (self.times[-1] if self.times else cast(float, self.first)) < SHORT_S:
            self.call(keep=False)
        end = time.perf_counter() + TURN_S
        while not self.done(seconds):
            self.call(keep=True)
            if time.perf_counter() >= end:
                return

    def done(self, seconds: float) -> bool:
        """Whether it needs no more turns."""
        return self.error is not None or (len(self.times) >= LEAST_RUNS and sum(self.times) >= seconds)

    def part_done(self, seconds: float) -> float:
        """How far it is, from 0 to 1."""
        return 1.0 if self.done(seconds) else min(sum(self.times) / seconds, 1.0) if seconds else 0.0


def measure(rows: Sequence[CellRun], seconds: float, first_calls: int, tell: Progress, after_turn: Callable[[], None]) -> None:
    """Make the first calls of each, and then measure in turns."""
    for row in sorted(rows, key=lambda row: -row.batch_size):  # the largest takes the memory at once
        tell(f"first calls: {_named(row)}", 0)
        row.warm_up(first_calls)
        after_turn()
    while waiting := [row for row in rows if not row.done(seconds)]:
        for row in waiting:
            tell(_named(row), sum(one.part_done(seconds) for one in rows) / len(rows))
            row.measure_round(seconds)
            after_turn()


def _named(row: CellRun) -> str:
    return f"{row.steps} step{'s' * (row.steps > 1)}, batch {row.batch_size}"


def summarize(row: CellRun, work: ModelCost, peak: MachinePeak) -> Cell:
    """A cell's figures."""
    if row.error is not None or not row.times:
        return Cell(steps=row.steps, batch_size=row.batch_size, evaluations=row.evaluations, error=row.error)
    median = float(np.median(row.times))
    evaluations = cast(int, row.evaluations)
    gflops = None
    if work.step_gflop is not None:
        gflops = row.batch_size * (evaluations * work.step_gflop + (work.decode_gflop or 0)) / median
    moved = evaluations * work.weight_bytes / 1e9 / median if work.weight_bytes else None
    spent = {"steps": [sum(part.steps) for part in row.parts], **{name: [getattr(part, name) for part in row.parts] for name in PARTS if name != "steps"}}
    return Cell(
        steps=row.steps,
        batch_size=row.batch_size,
        runs=len(row.times),
        evaluations=evaluations,
        first_ms=None if row.first is None else row.first * 1e3,
        median_ms=median * 1e3,
        p95_ms=float(np.percentile(row.times, 95)) * 1e3,
        min_ms=min(row.times) * 1e3,
        images_per_second=row.batch_size / median,
        parts_ms={name: float(np.median(spent[name])) * 1e3 for name in PARTS},
        gflops=gflops,
        product_share=gflops / peak.product_gflops if gflops is not None and peak.product_gflops else None,
        weights_gb_per_second=moved,
        copy_share=moved / peak.copy_gb_per_second if moved is not None and peak.copy_gb_per_second else None,
    )
