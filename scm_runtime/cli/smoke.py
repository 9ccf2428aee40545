"""``scm-runtime smoke``: check that a bundle samples correctly on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from scm_runtime.bundle.manifest import Dtype
from scm_runtime.generator import Generator
from scm_runtime.inputs.conditioning import PLACEHOLDER_SIZE, placeholder_conditioning
from scm_runtime.samples import Samples

REPEATS = 5
# Largest difference of a sample between batches, as the order of summation may depend on the batch size: a share of the largest value, and pixel levels.
TOLERANCES = {"fp32": (1e-4, 1), "fp16": (1e-2, 4), "bf16": (5e-2, 16)}

Draw = Callable[[Sequence[int], Literal["np", "latent"]], Samples]
"""Samples for seeds and an output type."""


def smoke_test(bundle: str, **options: Any) -> bool:
    """Run the checks of ``scm-runtime smoke``, print the results, and return True if all pass.

    ``options`` are Generator's. Raises what Generator raises.
    """
    console = Console()
    start = time.perf_counter()
    with Generator(bundle, **options) as generator:
        console.print(f"loaded in {(time.perf_counter() - start) * 1e3:.0f} ms", highlight=False)
        for line in _describe(generator):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        table = Table("steps", "finite", "deterministic", "independent of the batch", "batch 1, median", "batch 4, median")
        passed = True
        for steps in sorted(int(count) for count in generator.manifest.times):

            def draw(seeds: Sequence[int], output_type: Literal["np", "latent"], steps: int = steps) -> Samples:
                # Classes and embeddings follow from the seed, so that a seed has the same conditioning in every batch.
                conditioning = placeholder_conditioning(generator.manifest.conditioning, seeds)
                return generator(seed=seeds, num_inference_steps=steps, conditioning=conditioning, output_type=output_type)

            checks = _check(draw, generator.dtype)
            passed &= all(checks)
            medians = (statistics.median(draw(seeds, "np").timings.total for _ in range(REPEATS)) for seeds in ([7], [7, 8, 9, 10]))
            table.add_row(str(steps), *("yes" if check else "[bold red]NO[/]" for check in checks), *(f"{median * 1e3:.1f} ms" for median in medians))
    console.print(table)
    return passed


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


def _check(draw: Draw, dtype: Dtype) -> tuple[bool, bool, bool]:
    """Return whether samples are finite, deterministic, and independent of their batch."""
    batch = draw([7, 8, 9, 10], "latent").array
    alone, reordered = draw([9], "latent").array, draw([10, 9, 7], "latent").array
    pixels = [draw(seeds, "np").array.astype(np.float32) for seeds in ([7, 9], [9])]
    share, levels = TOLERANCES[dtype]
    atol = share * max(1.0, float(np.abs(batch).max()))
    return (
        bool(np.isfinite(batch).all()),
        bool(np.array_equal(batch, draw([7, 8, 9, 10], "latent").array)),
        bool(np.allclose(alone[0], batch[2], rtol=0, atol=atol) and np.allclose(reordered[1], batch[2], rtol=0, atol=atol))
        and bool(np.abs(pixels[0][1] - pixels[1][0]).max() <= levels),
    )
