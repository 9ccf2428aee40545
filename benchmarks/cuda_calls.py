"""What is the overhead of a call on a GPU, and which options of the CUDA provider are worth setting?

The overhead is the time of a call, from seeds to pixels on the host, minus the time of its noise, steps and decoder on the device; the target is 100 us.
Options: CUDA graphs, cuDNN's convolutions and its search for algorithms, channels last, TF32, fused biases. Each is measured together with the first call of a
shape, which includes searching and capturing. Without a GPU nothing is measured.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import Any

import click
from _common import AGAIN, Cells, interleaved

from scm_runtime import Generator
from scm_runtime.bundle.location import resolve_bundle
from scm_runtime.bundle.manifest import Dtype, read_manifest
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.devices.placement import resolve_device
from scm_runtime.errors import ScmError
from scm_runtime.inputs.arguments import OutputType

WARMUP_CALLS = 5  # they capture
OUTPUTS: tuple[OutputType, ...] = ("np", "dlpack", "latent")
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no CUDA graphs": {"cuda_graph": False},
    "cudnn": {"session_options": {"scm.convolution": "cudnn"}},
    "cudnn, EXHAUSTIVE": {"session_options": {"scm.convolution": "cudnn"}, "provider_options": {"cudnn_conv_algo_search": "EXHAUSTIVE"}},
    "prefer_nhwc=0": {"provider_options": {"prefer_nhwc": "0"}},
    "use_tf32=0": {"provider_options": {"use_tf32": "0"}},
    "fuse_conv_bias=1": {"provider_options": {"fuse_conv_bias": "1"}},
}


def options(bundle: str, dtype: Dtype, n: int, repeats: int) -> dict[str, Any]:
    """Time every variant in turn, round after round. A variant that fails has an ``error``, and stops no other."""
    with ExitStack() as opened:
        found: dict[str, dict[str, Any]] = {}
        candidates: dict[str, Callable[[], object]] = {}
        for name, arguments in VARIANTS.items():
            try:
                generate = opened.enter_context(Generator(bundle, device="cuda", dtype=dtype, cache_dir=False, **arguments))
                run = partial(generate, seed=0, batch_size=n, output_type="np")
                start = time.perf_counter()
                run()
            except ScmError as error:
                found[name] = {"error": str(error)}
            else:
                found[name], candidates[name] = {"first_call_ms": (time.perf_counter() - start) * 1e3}, run
        for name, times in interleaved(candidates, repeats).items():
            found[name] |= times
    return found


def overhead(generate: Generator, n: int, output: OutputType, repeats: int) -> dict[str, float]:
    """Return the time of a call, of its work on the device, and the difference, for a kind of output: medians of many calls."""
    for _ in range(WARMUP_CALLS):
        generate(seed=0, batch_size=n, output_type=output)
    calls = []
    for _ in range(repeats):
        start = time.perf_counter()
        timings = generate(seed=0, batch_size=n, output_type=output).timings
        whole, parts = time.perf_counter() - start, {"noise": timings.noise, "steps": sum(timings.steps), "decode": timings.decode}
        calls.append({"call": whole, **parts, "overhead": whole - sum(parts.values())})
    medians = {name: statistics.median(call[name] for call in calls) for name in calls[0]}
    return {
        **{f"{name}_ms": seconds * 1e3 for name, seconds in medians.items() if name != "overhead"},
        "overhead_us": medians["overhead"] * 1e6,
        "least_overhead_us": min(call["overhead"] for call in calls) * 1e6,
    }


@click.command()
@click.option("--bundle", default="digits", help="Folder or name of a bundle with times for two steps.")
@click.option("--batch-size", "batch_sizes", type=int, multiple=True, default=(1, 8, 64))
@click.option("--repeats", default=100)
@AGAIN
def main(bundle: str, batch_sizes: tuple[int, ...], repeats: int, again: bool) -> None:
    """Measure on the first GPU."""
    try:
        placement = resolve_device("cuda")
    except ScmError as error:
        print(f"no GPU, nothing measured: {error}")
        return
    dtypes = read_manifest(resolve_bundle(bundle, None).folder).dtypes
    machine = {"gpu": placement.hardware, "bundle": bundle, "python": platform.python_version(), "onnxruntime": load_onnxruntime().__version__}
    cells = Cells("cuda_calls", again=again, about=machine)
    for dtype in dtypes:
        with Generator(bundle, device="cuda", dtype=dtype) as generate:
            for n, output in product(batch_sizes, OUTPUTS):
                cells.measure("overhead", f"{dtype}, batch {n}, {output}", by=partial(overhead, generate, n, output, repeats))
    for dtype, n in product(dtypes, batch_sizes):
        cells.measure("options", f"{dtype}, batch {n}", by=partial(options, bundle, dtype, n, repeats))


if __name__ == "__main__":
    main()
