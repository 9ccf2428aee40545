"""Run a benchmark: measure how fast a bundle samples, and the machine's peak to compare with. Printing is in ``cli.bench``.

A cell is a number of steps with a batch size. Cells are measured in turns, in rounds, so that noise of the machine affects all of them alike.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np

from scm_runtime._version import __version__
from scm_runtime.bench.cells import CellRun, Progress, measure, summarize
from scm_runtime.bench.flops import count_graph, step_inputs
from scm_runtime.bench.machine import best_of, measure_cpu_peak, measure_gpu_peak
from scm_runtime.bench.memory import DeviceMemory, peak_bytes, resident_bytes
from scm_runtime.bench.result import BundleFacts, MachinePeak, Memory, ModelCost, Result, check_comparable, compare
from scm_runtime.bundle.checksums import sha256
from scm_runtime.bundle.manifest import MANIFEST, Dtype
from scm_runtime.devices.cpu import available_cores, processor_name
from scm_runtime.devices.placement import Placement, resolve_device
from scm_runtime.errors import InvalidArgumentError, ScmError
from scm_runtime.generator import Generator
from scm_runtime.inputs.arguments import CallArguments
from scm_runtime.inputs.conditioning import placeholder_conditioning
from scm_runtime.ort.native_ops import NativeOps

DEFAULT_STEPS = (1, 2)  # for a consistency model
ITEM_BYTES: dict[Dtype, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class BenchOptions:
    """What to measure, from the command line."""

    bundle: str
    batch_sizes: tuple[int, ...] = (1, 8)
    steps: tuple[int, ...] | None = None
    """None for the default: 1 and 2 of a consistency model, as far as the bundle supports them; else the default of a Generator's call."""
    sampler: str | None = None
    """None for the bundle's default."""
    seconds: float = 3.0
    """Time to measure each cell; at least three calls are made."""
    revision: str | None = None
    device: str = "auto"
    dtype: Dtype | Literal["auto"] = "auto"
    threads: int | None = None
    native_ops: NativeOps = "auto"
    verify_integrity: bool = True


def run_bench(options: BenchOptions, other: tuple[Path, Result] | None = None, progress: Progress = lambda what, part: None) -> Result:
    """Measure a bundle, and return the result.

    Ctrl-C ends the measurement early: the result so far is returned, with ``interrupted`` set. If nothing was measured yet, KeyboardInterrupt is raised.

    Args:
        options: what to measure.
        other: file and contents of an earlier result to compare with.
        progress: called with the current activity and the completed share.

    Raises:
        InvalidArgumentError: an option is out of range, the bundle does not have the steps or the sampler, or the other result has none of the cells.
        BundleNotFoundError, DeviceError and others: see Generator. A cell that fails does not raise: see ``Cell.error``.
    """
    if not options.batch_sizes or options.steps == ():
        raise InvalidArgumentError(f"batch_sizes and steps must hold at least one number, got {options.batch_sizes} and {options.steps}")
    progress("opening the bundle", 0)
    placement = resolve_device(options.device)
    device = DeviceMemory(placement.index)
    start = time.perf_counter()
    generator = Generator(
        options.bundle,
        revision=options.revision,
        device=placement.device,
        dtype=options.dtype,
        threads=options.threads,
        native_ops=options.native_ops,
        verify_integrity=options.verify_integrity,
    )
    open_ms = (time.perf_counter() - start) * 1e3
    cost, peak, interrupted = _cost(generator, reason="interrupted"), MachinePeak(reason="interrupted"), False
    with generator:
        opened = resident_bytes()
        runs = _plan(generator, options)
        if other:
            check_comparable(other[1], other[0], [(run.steps, run.batch_size) for run in runs])
        try:
            progress("measuring the machine", 0)
            peak = measure_cpu_peak(options.threads) if placement.index is None else peak
            measure(runs, options.seconds, progress, device.update)
        except KeyboardInterrupt:
            if not any(run.times for run in runs):
                raise
            interrupted = True
        memory = Memory(process_opened=opened, process_peak=peak_bytes(), device_peak=device.growth)
    if not interrupted:  # the Generator is closed, so that its memory is available to other sessions
        try:
            progress("measuring the machine", 1)
            peak = best_of(peak, measure_cpu_peak(options.threads)) if placement.index is None else measure_gpu_peak(placement, generator.dtype)
            progress("counting operations", 1)
            cost = _count(generator, placement, options.threads, runs)
        except KeyboardInterrupt:
            interrupted = True
    info, manifest = generator.info, generator.manifest
    result = Result(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        bundle=BundleFacts(name=manifest.name, sha256=sha256(generator.folder / MANIFEST), family=manifest.family, parameters=manifest.parameters),
        device=info.device,
        hardware=placement.hardware or processor_name(),
        provider=info.provider,
        dtype=info.dtype,
        native_ops=info.native_ops_version if info.native_ops else None,
        cuda_graph=info.cuda_graph,
        threads=options.threads,
        cores=available_cores(),
        versions={"scm_runtime": __version__, "python": platform.python_version(), "onnxruntime": info.onnxruntime, "numpy": np.__version__},
        sampler=options.sampler,
        seconds=options.seconds if isfinite(options.seconds) else None,  # JSON has no infinity
        open_ms=open_ms,
        interrupted=interrupted,
        cells=tuple(summarize(run, cost, peak) for run in runs),
        memory=memory,
        work=cost,
        peak=peak,
    )
    return msgspec.structs.replace(result, comparison=compare(result, other[1], other[0])) if other else result


def _plan(generator: Generator, options: BenchOptions) -> list[CellRun]:
    """Create the cells. Their arguments are checked before anything is measured."""
    manifest, runs = generator.manifest, []
    default = tuple(count for count in DEFAULT_STEPS if str(count) in manifest.times and manifest.solver == "consistency")
    for wanted in dict.fromkeys(options.steps or default or (None,)):
        arguments = {
            "num_inference_steps": wanted,
            "sampler": options.sampler,
            "seed": 0,
            "conditioning": placeholder_conditioning(manifest.conditioning, range(1)),
            "output_type": "np",
        }
        steps = generator._read_request(None, cast(CallArguments, arguments)).trajectory.call.steps
        runs += [CellRun(generator, steps, size, {**arguments, "batch_size": size}) for size in dict.fromkeys(options.batch_sizes)]
    return runs


def _count(generator: Generator, placement: Placement, threads: int | None, runs: Sequence[CellRun]) -> ModelCost:
    """Count the operations of a sample. If that fails, the result has a ``reason``."""
    manifest, dtype = generator.manifest, generator.dtype
    run = next((run for run in runs if run.first is not None), None)
    if run is None:
        return _cost(generator, reason="no cell could be measured")
    inputs = step_inputs(manifest.sample.shape, next(iter(manifest.times.values())), run.conditioning)
    try:
        step = count_graph(generator.folder / f"step.{dtype}.onnx", placement, threads, inputs)
        decode = count_graph(generator.folder / f"decode.{dtype}.onnx", placement, threads, {"x": inputs["x"]})
    except (ScmError, OSError, LookupError, ValueError) as error:  # a full disk, a profile in another format
        return _cost(generator, reason=f"a graph could not be profiled: {error}")
    return _cost(generator, step_gflop=step.flop / 1e9, decode_gflop=decode.flop / 1e9, uncounted=tuple(sorted(step.uncounted | decode.uncounted)))


def _cost(generator: Generator, **known: Any) -> ModelCost:
    return ModelCost(weight_bytes=generator.manifest.parameters * ITEM_BYTES[generator.dtype], **known)
