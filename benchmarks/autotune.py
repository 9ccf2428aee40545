"""Which kernel, tile and split is the fastest for each convolution and product of EDM2? Writes the table that the library chooses by.

    python benchmarks/autotune.py --size S --size XXL          a minute or two on a GPU
    make ops SCM_OPS_CUDA=ON                                    builds the library with the new table

For each shape, our kernel with the tiles and splits that are the best on paper (``_paper/kernels.py``), and cuDNN or cuBLAS, at batch 1 and 8, in float16. The
operation that follows in the network is included: in our kernel, or in a kernel of its own. The choice of the kernel and of the split is made at batch 1, so
that it does not depend on the batch. Shapes that were measured on this machine are not measured again: a run that was interrupted goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from _autotune.table import FOLDER, TABLE, Row, tiles, updated
from _autotune.timing import seconds
from _common import save, stored_figures
from _paper.gpus import GPUS, Gpu
from _paper.kernels import library, own_candidates
from _paper.layers import Operation, operations

from scm_export.networks.edm2 import PRESETS
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.devices.placement import resolve_device
from scm_runtime.errors import ScmError
from scm_runtime.ort.native_ops import Library, find_library

MANY = 8
RESULT = "autotune"


def shapes(sizes: Sequence[str]) -> list[Operation]:
    """Return the convolutions and products of some networks, each shape once: with the operation that follows, if it is followed by one anywhere."""
    found: dict[tuple[int, ...], Operation] = {}
    for size in sizes:
        for one in operations(size):
            if one.kind in ("convolution", "product"):
                key = (one.taps, one.pixels, one.inputs, one.outputs)
                if key not in found or (one.follower and not found[key].follower):
                    found[key] = one
    return [found[key] for key in sorted(found, reverse=True)]


def measure(operation: Operation, gpu: Gpu, numbers: dict[str, int], native: Library, most: int) -> dict[str, Any]:
    """Return microseconds at batch 1 and MANY: of the library, and of tiles with splits, named as "mma_64x64 / 4"."""
    expected = library(gpu, operation).seconds

    def time_of(name: str, split: int, samples: int) -> float:
        return seconds(operation, samples, expected * max(1, samples / 2), native, (numbers[name], split)) * 1e6

    alone: dict[str, float] = {}
    for choice in own_candidates(gpu, operation)[:most]:
        name = f"{choice.instruction}_{choice.tile[0]}x{choice.tile[1]}"
        try:
            alone[f"{name} / {choice.split}"] = time_of(name, choice.split, 1)
        except Exception as error:  # noqa: BLE001  # ONNX Runtime's exceptions have no common base class; a tile may need another device
            click.echo(f"  {name} / {choice.split}: {error}")
    if not alone:
        raise click.ClickException("our kernel cannot run: no tile was measured")
    best, split = min(alone, key=lambda name: alone[name]).split(" / ")
    family = best.split("_")[0]  # all of its tiles give the same bits for the same split
    many = {f"{name} / {split}": time_of(name, int(split), MANY) for name in numbers if name.startswith(f"{family}_")}  # large tiles that lose alone too
    others = {str(samples): seconds(operation, samples, expected * max(1, samples / 2), native, None) * 1e6 for samples in (1, MANY)}
    return {"1": alone, str(MANY): many, "library": others}


def row(operation: Operation, figures: dict[str, Any], capability: int) -> Row:
    """Return the line of the table for a shape's figures."""
    best = min(figures["1"], key=lambda name: figures["1"][name])
    tile, split = best.split(" / ")
    own = figures["1"][best] <= figures["library"]["1"]
    many = min(figures[str(MANY)], key=lambda name: figures[str(MANY)][name]).split(" / ")[0]
    return Row(capability, operation.pixels, operation.inputs, operation.outputs, operation.taps, own, int(split), tile, many)


def key(operation: Operation) -> str:
    """Return the name of a shape in the stored figures."""
    return f"{operation.resolution}x{operation.resolution} {operation.inputs} -> {operation.outputs}, {operation.taps} taps, {operation.follower or 'alone'}"


@click.command()
@click.option("--size", "sizes", type=click.Choice(list(PRESETS)), multiple=True, help="Sizes of EDM2 at 64x64x4; by default all.")
@click.option("--candidates", "most", type=click.IntRange(1), default=6, show_default=True, help="Pairs of tile and split for each shape.")
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
    figures = {name: found for name, found in stored_figures(RESULT).items() if found.get("hardware") == hardware}
    for operation in wanted:
        if key(operation) in figures:
            continue
        if time.monotonic() > end:
            click.echo("the time is over: call it again for the rest")
            break
        figures[key(operation)] = {"hardware": hardware, **measure(operation, gpu, numbers, native, most)}
        save(RESULT, figures)
        click.echo(f"{key(operation)}: {figures[key(operation)]}")
    capability = int(hardware.rsplit(" ", 1)[1].replace(".", ""))
    rows = [row(operation, figures[key(operation)], capability) for operation in wanted if key(operation) in figures]
    text = table.read_text() if table.exists() else ""
    table.write_text(updated(text, rows, f"{hardware}, ONNX Runtime {load_onnxruntime().__version__}"))
    ours = sum(one.own for one in rows)
    click.echo(f"{len(rows)} of {len(wanted)} shapes in '{table}': our kernel is the faster one for {ours}. Build it: make ops SCM_OPS_CUDA=ON")


if __name__ == "__main__":
    main()
