"""Which tile and split is the fastest for each shape that our convolution kernel computes in EDM2? Writes the table that the library chooses by.

    python benchmarks/autotune.py --size S --size XXL          a minute or two on a GPU
    make ops SCM_OPS_CUDA=ON                                    builds the library with the new table

For each shape, the families and splits that are the best on paper (``_paper/own.py``), at batch 1 and 8, in float16, and cuDNN or cuBLAS for comparison. The
operation that follows in the network is included: in our kernel, or in a kernel of its own. As in the library, the family and the split are those with the
shortest mean time per sample of both batches, so that a sample's bits do not depend on the batch; each batch has its own tile. Shapes that were measured on
this machine with the same kernels are not measured again: a run that was interrupted goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from _autotune.table import FOLDER, TABLE, Row, family, sources_hash, tiles, updated
from _autotune.timing import seconds
from _common import save, stored_figures
from _paper.gpus import GPUS, Gpu
from _paper.kernels import library
from _paper.layers import Operation, operations
from _paper.own import LARGE_BATCH, fastest, narrow, ranked

from scm_export.networks.edm2 import PRESETS
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.devices.placement import resolve_device
from scm_runtime.errors import ScmError
from scm_runtime.ort.native_ops import Library, find_library

MANY = LARGE_BATCH
BATCHES = (1, MANY)
RESULT = "autotune"


def shapes(sizes: Sequence[str]) -> list[Operation]:
    """Return the shapes of some networks that our kernel computes with a choice of tiles, each once, with the operation that follows it anywhere."""
    found: dict[tuple[int, ...], Operation] = {}
    for size in sizes:
        for one in operations(size):
            ours = one.kind == "convolution" or (one.kind == "product" and one.follower)  # other products are left to cuBLAS
            if ours and not narrow(one):
                key = (one.taps, one.pixels, one.inputs, one.outputs)
                if key not in found or (one.follower and not found[key].follower):
                    found[key] = one
    return [found[key] for key in sorted(found, reverse=True)]


def measure(operation: Operation, gpu: Gpu, numbers: dict[str, int], native: Library, most: int) -> dict[str, Any]:
    """Return microseconds at batch 1 and MANY, of tiles with splits, named as "mma_64x64 / 4", and of the library; and whether our kernel is the faster one."""
    expected = library(gpu, operation).seconds
    ours: dict[str, dict[str, float]] = {str(samples): {} for samples in BATCHES}

    def time_of(samples: int, tile: tuple[int, int] | None) -> float:
        return seconds(operation, samples, expected * max(1, samples / 2), native, tile) * 1e6

    def measure_tile(name: str, split: int, samples: int) -> None:
        key = f"{name} / {split}"
        if key in ours[str(samples)]:
            return
        try:
            ours[str(samples)][key] = time_of(samples, (numbers[name], split))
        except Exception as error:  # noqa: BLE001  # ONNX Runtime's exceptions have no common base class; a tile may need another device
            click.echo(f"  {key}: {error}")

    for wanted, split in ranked(gpu, operation)[:most]:
        for samples in BATCHES:
            batch = replace(operation, pixels=samples * operation.pixels)
            measure_tile(fastest(gpu, batch, wanted, split).tile.name, split, samples)
    if not set.intersection(*(set(_best_by_kind(times)) for times in ours.values())):
        raise click.ClickException("our kernel cannot run: no tile was measured")
    wanted, split = best_kind(ours)
    for name in numbers:
        for samples in BATCHES:
            if family(name) == wanted:
                measure_tile(name, split, samples)
    others = {str(samples): time_of(samples, None) for samples in BATCHES}
    return {**ours, "library": others, "own": min(ours["1"].values()) <= others["1"]}


def best_kind(figures: dict[str, dict[str, float]]) -> tuple[str, int]:
    """Return the family and the split with the shortest mean time per sample of both batches."""
    one, many = (_best_by_kind(figures[str(samples)]) for samples in BATCHES)
    return min(one.keys() & many.keys(), key=lambda kind: (one[kind][0] + many[kind][0] / MANY, kind))


def _best_by_kind(times: dict[str, float]) -> dict[tuple[str, int], tuple[float, str]]:
    """Return the shortest time and its tile for each family and split."""
    found: dict[tuple[str, int], tuple[float, str]] = {}
    for key, time_us in times.items():
        tile, split = key.split(" / ")
        kind = (family(tile), int(split))
        found[kind] = min(found.get(kind, (time_us, tile)), (time_us, tile))
    return found


def row(operation: Operation, figures: dict[str, Any], capability: int) -> Row:
    """Return the line of the table for a shape's figures."""
    kind = best_kind(figures)
    alone, many = (_best_by_kind(figures[str(samples)])[kind][1] for samples in BATCHES)
    return Row(capability, operation.pixels, operation.inputs, operation.outputs, operation.taps, kind[1], alone, many)


def key(operation: Operation) -> str:
    """Return the name of a shape in the stored figures."""
    return f"{operation.resolution}x{operation.resolution} {operation.inputs} -> {operation.outputs}, {operation.taps} taps, {operation.follower or 'alone'}"


@click.command()
@click.option("--size", "sizes", type=click.Choice(list(PRESETS)), multiple=True, help="Sizes of EDM2 at 64x64x4; by default all.")
@click.option("--candidates", "most", type=click.IntRange(1), default=4, show_default=True, help="Pairs of family and split for each shape.")
@click.option("--seconds", "limit", type=float, default=float("inf"), help="Start no further shape after this time.")
@click.option("--table", type=click.Path(dir_okay=False, path_type=Path), default=TABLE, help="The table to update; by default that of the library.")
def main(sizes: tuple[str, ...], most: int, limit: float, table: Path) -> None:
    """Measure the convolution's tiles on this GPU, and write the table that the library is built with."""
    end = time.monotonic() + limit
    try:
        hardware = resolve_device("cuda").hardware
    except ScmError as error:
        raise click.ClickException(f"no GPU, nothing measured: {error}") from error
    native = find_library()
    if native is None or native.info.cuda is None:
        raise click.ClickException("the native library has no CUDA kernels: make ops SCM_OPS_CUDA=ON")
    gpu = next((known for name, known in GPUS.items() if name in hardware), GPUS["H200"])
    numbers = tiles((FOLDER / "op.h").read_text())
    wanted = shapes(sizes or list(PRESETS))
    about = {"hardware": hardware, "kernels": sources_hash()}
    figures = {name: found for name, found in stored_figures(RESULT).items() if about.items() <= found.items()}
    for operation in wanted:
        if key(operation) in figures:
            continue
        if time.monotonic() > end:
            click.echo("the time is over: call it again for the rest")
            break
        figures[key(operation)] = {**about, **measure(operation, gpu, numbers, native, most)}
        save(RESULT, figures)
        click.echo(f"{key(operation)}: {figures[key(operation)]}")
    capability = int(hardware.rsplit(" ", 1)[1].replace(".", ""))
    rows = [row(operation, figures[key(operation)], capability) for operation in wanted if key(operation) in figures]
    text = table.read_text() if table.exists() else ""
    table.write_text(updated(text, rows, f"{hardware}, ONNX Runtime {load_onnxruntime().__version__}"))
    ours = sum(figures[key(operation)]["own"] for operation in wanted if key(operation) in figures)
    click.echo(f"{len(rows)} of {len(wanted)} shapes in '{table}': our kernel is faster than cuDNN or cuBLAS for {ours}. Build it: make ops SCM_OPS_CUDA=ON")


if __name__ == "__main__":
    main()
