"""``scm-runtime bench``: how fast a bundle samples here, and what share that is of what the machine can do.

A cell is a number of steps and a batch size. Cells take turns, round after round, so that a noisy machine disturbs all alike. Nothing here prints.
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
from scm_runtime.bench.cells import Row, Tell, figures, measure
from scm_runtime.bench.flops import count_graph, step_inputs
from scm_runtime.bench.machine import better, cores, cpu_peak, gpu_peak, processor
from scm_runtime.bench.memory import DeviceMemory, peak_bytes, resident_bytes
from scm_runtime.bench.result import BundleFacts, Memory, Peak, Result, Work, check_comparable, compare
from scm_runtime.bundle.manifest import MANIFEST, Dtype, sha256
from scm_runtime.devices.placement import Placement, place
from scm_runtime.errors import InvalidArgumentError, ScmError
from scm_runtime.generator import CAPTURE_RUNS, Generator
from scm_runtime.inputs.arguments import CallArguments
from scm_runtime.inputs.conditioning import stand_ins
from scm_runtime.ort.native_ops import NativeOps

USUAL_STEPS = (1, 2)  # of a consistency model, where none are named
ITEM_BYTES: dict[Dtype, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Order:
    """What is to be measured, as typed."""

    bundle: str
    batch_sizes: tuple[int, ...] = (1, 8)
    steps: tuple[int, ...] | None = None
    """None: of a consistency model 1 and 2, as far as the bundle has them; of others what a call takes."""
    sampler: str | None = None
    """None: the bundle's own."""
    seconds: float = 3.0
    """For each cell; where three calls take longer, they are made all the same."""
    revision: str | None = None
    device: str = "auto"
    dtype: Dtype | Literal["auto"] = "auto"
    threads: int | None = None
    native_ops: NativeOps = "auto"
    verify_integrity: bool = True


def bench(order: Order, other: tuple[Path, Result] | None = None, tell: Tell = lambda what, part: None) -> Result:
    """Measure.

    Ctrl-C ends it early: what was measured by then is returned, with ``interrupted`` set; where that is nothing, KeyboardInterrupt goes on.

    Args:
        order: what.
        other: an earlier result to compare with, and its file.
        tell: is told of the progress.

    Raises:
        InvalidArgumentError: an argument is out of range, the bundle has no such steps or sampler, or the other result has none of the cells.
        BundleNotFoundError, DeviceError and so on: as Generator does. A cell that fails is no error: see ``Cell.error``.
    """
    if not order.batch_sizes or order.steps == ():
        raise InvalidArgumentError(f"batch_sizes and steps must hold at least one number, got {order.batch_sizes} and {order.steps}")
    tell("opening the bundle", 0)
    placement = place(order.device)
    device = DeviceMemory(placement.index)
    start = time.perf_counter()
    generator = Generator(
        order.bundle,
        revision=order.revision,
        device=placement.device,
        dtype=order.dtype,
        threads=order.threads,
        native_ops=order.native_ops,
        verify_integrity=order.verify_integrity,
    )
    open_ms = (time.perf_counter() - start) * 1e3
    work, peak, interrupted = _work(generator, reason="interrupted"), Peak(reason="interrupted"), False
    with generator:
        opened = resident_bytes()
        rows = _plan(generator, order)
        if other:
            check_comparable(other[1], other[0], [(row.steps, row.batch_size) for row in rows])
        try:
            tell("measuring the machine", 0)
            peak = cpu_peak(order.threads) if placement.index is None else peak
            measure(rows, order.seconds, CAPTURE_RUNS if generator.info.cuda_graph else 1, tell, device.look)
        except KeyboardInterrupt:
            if not any(row.times for row in rows):
                raise
            interrupted = True
        memory = Memory(process_opened=opened, process_peak=peak_bytes(), device_peak=device.growth)
    if not interrupted:  # the bundle is closed, and its memory free for other sessions
        try:
            tell("measuring the machine", 1)
            peak = better(peak, cpu_peak(order.threads)) if placement.index is None else gpu_peak(placement, generator.dtype)
            tell("counting operations", 1)
            work = _count(generator, placement, order.threads, rows)
        except KeyboardInterrupt:
            interrupted = True
    info, manifest = generator.info, generator.manifest
    result = Result(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        bundle=BundleFacts(name=manifest.name, sha256=sha256(generator.folder / MANIFEST), family=manifest.family, parameters=manifest.parameters),
        device=info.device,
        hardware=placement.hardware or processor(),
        provider=info.provider,
        dtype=info.dtype,
        native_ops=info.native_ops_version if info.native_ops else None,
        cuda_graph=info.cuda_graph,
        threads=order.threads,
        cores=cores(),
        versions={"scm_runtime": __version__, "python": platform.python_version(), "onnxruntime": info.onnxruntime, "numpy": np.__version__},
        sampler=order.sampler,
        seconds=order.seconds if isfinite(order.seconds) else None,  # JSON has no infinity
        open_ms=open_ms,
        interrupted=interrupted,
        cells=tuple(figures(row, work, peak) for row in rows),
        memory=memory,
        work=work,
        peak=peak,
    )
    return msgspec.structs.replace(result, comparison=compare(result, other[1], other[0])) if other else result


def _plan(generator: Generator, order: Order) -> list[Row]:
    """The cells, with their arguments checked before any of them is computed."""
    manifest, rows = generator.manifest, []
    usual = tuple(count for count in USUAL_STEPS if str(count) in manifest.times and manifest.solver == "consistency")
    for wanted in dict.fromkeys(order.steps or usual or (None,)):
        arguments = {
            "num_inference_steps": wanted,
            "sampler": order.sampler,
            "seed": 0,
            "conditioning": stand_ins(manifest.conditioning, range(1)),
            "output_type": "np",
        }
        steps = generator._read_request(None, cast(CallArguments, arguments)).trajectory.call.steps
        rows += [Row(generator, steps, size, {**arguments, "batch_size": size}) for size in dict.fromkeys(order.batch_sizes)]
    return rows


def _count(generator: Generator, placement: Placement, threads: int | None, rows: Sequence[Row]) -> Work:
    """What a sample takes; ``Work.reason`` where it cannot be counted."""
    manifest, dtype = generator.manifest, generator.dtype
    row = next((row for row in rows if row.first is not None), None)
    if row is None:
        return _work(generator, reason="no cell could be computed")
    inputs = step_inputs(manifest.sample.shape, next(iter(manifest.times.values())), row.conditioning)
    try:
        step = count_graph(generator.folder / f"step.{dtype}.onnx", placement, threads, inputs)
        decode = count_graph(generator.folder / f"decode.{dtype}.onnx", placement, threads, {"x": inputs["x"]})
    except (ScmError, OSError, LookupError, ValueError) as error:  # a full disk, a profile of another shape
        return _work(generator, reason=f"a graph could not be profiled: {error}")
    return _work(generator, step_gflop=step.flop / 1e9, decode_gflop=decode.flop / 1e9, uncounted=tuple(sorted(step.uncounted | decode.uncounted)))


def _work(generator: Generator, **known: Any) -> Work:
    return Work(weight_bytes=generator.manifest.parameters * ITEM_BYTES[generator.dtype], **known)
