"""What does a step of EDM2 cost on a GPU, on paper? FLOP, bytes, launches and times by resolution and kind, in four forms of the graph.

    python benchmarks/paper_model.py                      XXL on an H200: the tables of NOTES.md
    python benchmarks/paper_model.py --size S --gpu A100
    python benchmarks/paper_model.py --size XXS --launches FILE    and compare the launches with a log of the stub GPU (tests/stub)

Nothing is measured: ``_paper/gpus.py`` has the assumptions and their sources. The layers are those of scm_export's network, without weights. The forms are
"channels first", with transposes around every convolution; "channels last", with cuDNN's channels-last kernels; "fused", with our own convolution and the
operations that follow in its kernel, as the package runs it; "best of both", with our own convolution only where it is faster than cuDNN's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
from _paper.forms import FORMS, Launch, ideal_seconds
from _paper.gpus import GPUS, Gpu
from _paper.layers import Operation, operations
from _paper.stub_log import launches_of_a_step
from _paper.tables import table

from scm_export.networks.edm2 import PRESETS


def summary(gpu: Gpu, step: Sequence[Operation]) -> list[list[str]]:
    """Return a row for each form: launches, and milliseconds by kind."""
    rows = []
    for name, form in FORMS.items():
        launches = form(gpu, step)
        named = {"convolution": 0.0, "product": 0.0, "elementwise": 0.0, "transposes": 0.0, "conversions by cuDNN": 0.0}
        for launch in launches:
            kind = launch.what.removesuffix(", ours")
            named[kind if kind in named else "elementwise"] += launch.seconds * 1e3
        total = sum(launch.seconds for launch in launches) * 1e3
        rows.append([name, str(sum(launch.count for launch in launches)), *(f"{ms:.2f}" for ms in named.values()), f"{total:.2f}", f"{2 * total:.1f}"])
    return rows


def by_resolution(launches: Iterable[Launch]) -> list[list[str]]:
    """Return a row for each resolution and kind: launches, GFLOP, MB and microseconds."""
    groups: dict[tuple[int, str], list[Launch]] = defaultdict(list)
    for launch in launches:
        groups[launch.resolution, launch.what].append(launch)
    rows = []
    for (resolution, what), group in sorted(groups.items(), key=lambda item: (-item[0][0], item[0][1])):
        flop, nbytes, seconds = (sum(getattr(launch, name) for launch in group) for name in ("flop", "nbytes", "seconds"))
        place = f"{resolution}×{resolution}" if resolution else "–"
        rows.append([place, what, str(sum(launch.count for launch in group)), f"{flop / 1e9:.1f}", f"{nbytes / 1e6:.0f}", f"{seconds * 1e6:.0f}"])
    return rows


@click.command()
@click.option("--size", type=click.Choice(list(PRESETS)), default="XXL", show_default=True, help="Size of EDM2, at 64x64x4.")
@click.option("--gpu", "name", type=click.Choice(list(GPUS)), default="H200", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--scm", is_flag=True, help="With sCM's double normalization, which no convolution can compute in its kernel.")
@click.option("--form", "forms", type=click.Choice(list(FORMS)), multiple=True, help="Also print the table by resolution and kind.")
@click.option("--launches", "log", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A log of the stub GPU to compare with.")
def main(size: str, name: str, batch_size: int, scm: bool, forms: tuple[str, ...], log: Path | None) -> None:
    """Print what a step of EDM2 costs on a GPU, on paper."""
    gpu, step = GPUS[name], operations(size, batch_size, scm=scm)
    flop, weights = sum(one.flop for one in step), sum(one.weight_bytes for one in step)
    what = f"EDM2-{size} 64x64x4{' with double normalization' if scm else ''}, batch {batch_size}, {gpu.name}"
    print(f"{what}, a step: {flop / 1e12:.3f} TFLOP, {weights / 1e9:.2f} GB of weights, roofline {ideal_seconds(gpu, step) * 1e3:.2f} ms\n")
    columns = ("form", "launches", "convolutions", "products", "elementwise", "transposes", "conversions", "ms a step", "two steps")
    print(table(columns, summary(gpu, step)))
    for form in forms:
        print(f"\n{form}\n")
        print(table(("resolution", "kind", "launches", "GFLOP", "MB", "us"), by_resolution(FORMS[form](gpu, step))))
    if log is not None:
        print("\nLaunches of a step in the log, by kind\n")
        found = launches_of_a_step(log)
        print(table(("kind", "launches"), [(kind, str(count)) for kind, count in found.most_common()]))
        print(f"\n{found.total()} launches; on paper {', '.join(f'{row[1]} ({row[0]})' for row in summary(gpu, step))}")


if __name__ == "__main__":
    main()
