"""``scm-runtime smoke``: check that a bundle samples correctly on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Struct
from rich.text import Text

from scm_runtime.bundle.manifest import Dtype, OutputSpec
from scm_runtime.cli.tables import BAD, OutputConsole, print_table
from scm_runtime.generator import Generator
from scm_runtime.inputs.conditioning import PLACEHOLDER_SIZE, placeholder_conditioning
from scm_runtime.samples import Samples

REPEATS = 5
# Largest difference of a sample between batches, as the order of summation may depend on the batch size: a share of the largest value, and pixel levels.
TOLERANCES = {"fp32": (1e-4, 1), "fp16": (1e-2, 4), "bf16": (5e-2, 16)}

Draw = Callable[[Sequence[int], Literal["np", "latent"]], Samples]
"""Samples for seeds and an output type."""


class StepsResult(Struct, frozen=True):
    """Checks and latencies with one number of steps."""

    steps: int
    finite: bool
    deterministic: bool
    """The same seeds gave the same samples again."""
    independent: bool
    """Samples do not depend on their batch."""
    contrast: bool
    """No decoded sample has the same value everywhere, as a black image has. True for samples of one pixel or value."""
    median_ms: dict[str, float]
    """Median latency in milliseconds by batch size."""

    @property
    def passed(self) -> bool:
        """True if all checks passed."""
        return self.finite and self.deterministic and self.independent and self.contrast


class SmokeResult(Struct, frozen=True):
    """The result of ``scm-runtime smoke``; the JSON document of ``--json``."""

    passed: bool
    opened_ms: float
    facts: tuple[str, ...]
    """What computes, and which inputs got random values."""
    results: tuple[StepsResult, ...]

    def to_json(self) -> bytes:
        """Encode as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)


def smoke_test(bundle: str, **options: Any) -> SmokeResult:
    """Run the checks of ``scm-runtime smoke``. ``options`` are Generator's. Raises what Generator raises."""
    start = time.perf_counter()
    with Generator(bundle, **options) as generator:
        opened_ms = (time.perf_counter() - start) * 1e3
        results = tuple(_try_steps(generator, steps) for steps in sorted(int(count) for count in generator.manifest.times))
        return SmokeResult(all(result.passed for result in results), opened_ms, tuple(_describe(generator)), results)


def show_result(result: SmokeResult) -> None:
    """Print a result as a table."""
    console = OutputConsole()
    for line in (f"loaded in {result.opened_ms:.0f} ms", *result.facts):
        console.write_line(line)
    sizes = list(result.results[0].median_ms)
    rows = []
    for row in result.results:
        checks = ["yes" if check else Text("NO", BAD) for check in (row.finite, row.deterministic, row.independent, row.contrast)]
        rows.append((str(row.steps), *checks, *(f"{row.median_ms[size]:.1f} ms" for size in sizes)))
    print_table(console, ("steps", "finite", "deterministic", "independent of the batch", "contrast", *(f"batch {size}, median" for size in sizes)), rows)


def _try_steps(generator: Generator, steps: int) -> StepsResult:
    def draw(seeds: Sequence[int], output_type: Literal["np", "latent"]) -> Samples:
        # Classes and embeddings follow from the seed, so that a seed has the same conditioning in every batch.
        conditioning = placeholder_conditioning(generator.manifest.conditioning, seeds)
        return generator(seed=seeds, num_inference_steps=steps, conditioning=conditioning, output_type=output_type)

    finite, deterministic, independent, contrast = _check(draw, generator.dtype, generator.manifest.output)
    medians = {str(len(seeds)): statistics.median(draw(seeds, "np").timings.total for _ in range(REPEATS)) * 1e3 for seeds in ([7], [7, 8, 9, 10])}
    return StepsResult(steps, finite, deterministic, independent, contrast, medians)


def _describe(generator: Generator) -> list[str]:
    """What computes, and which inputs get random values."""
    info, inputs = generator.info, generator.manifest.conditioning
    lines = [
        f"{info.dtype} on {info.device}, ONNX Runtime {info.onnxruntime} ({info.provider})",
        f"native kernels {info.native_ops_version}" if info.native_ops else f"function bodies, no native kernels: {info.native_ops_reason}",
    ]
    if random := [f"{item.name} {item.describe()}" for item in inputs if item.kind == "embedding"]:
        dynamic = sorted({size for item in inputs for size in item.shape if isinstance(size, str)})
        sizes = "".join(f", {PLACEHOLDER_SIZE} {name}" for name in dynamic)
        lines.append(f"random values for {', '.join(random)}{sizes}: the checks hold for any values, but say nothing about images from a text encoder")
    return lines


def _check(draw: Draw, dtype: Dtype, output: OutputSpec) -> tuple[bool, bool, bool, bool]:
    """Return whether samples are finite, deterministic, independent of their batch, and have contrast."""
    batch = draw([7, 8, 9, 10], "latent").array
    alone, reordered = draw([9], "latent").array, draw([10, 9, 7], "latent").array
    pixels, pixels_alone = (draw(seeds, "np").array.astype(np.float32) for seeds in ([7, 8, 9, 10], [9]))
    places = math.prod(output.shape[:2] if output.kind == "image" else output.shape)
    share, levels = TOLERANCES[dtype]
    atol = share * max(1.0, float(np.abs(batch).max()))
    return (
        bool(np.isfinite(batch).all()),
        bool(np.array_equal(batch, draw([7, 8, 9, 10], "latent").array)),
        bool(np.allclose(alone[0], batch[2], rtol=0, atol=atol) and np.allclose(reordered[1], batch[2], rtol=0, atol=atol))
        and bool(np.abs(pixels[2] - pixels_alone[0]).max() <= levels),
        places == 1 or all(bool(sample.min() < sample.max()) for sample in pixels),
    )
