"""What ``scm-runtime bench`` prints: the tables on stdout, and while it measures a line on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scm_runtime.bench.cells import Progress
from scm_runtime.bench.result import Cell, Comparison, MachinePeak, Memory, ModelCost, Result

COLUMNS = ("steps", "batch", "median\nms", "p95\nms", "min\nms", "images/s", "of\nproduct", "of\ncopy", "runs")
CAPTION = "of product, of copy: the share of what the machine reaches in them"


@contextmanager
def progress() -> Iterator[Progress]:
    """A line on stderr that says what is measured, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda what, part: None
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    # Refreshed between calls: a thread that did it by itself would do so during them.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, part: bar.update(task, description=what, completed=part, refresh=True)


def show_result(result: Result) -> None:
    """Print a result, with the ratios to another where it has them."""
    console = Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    kernels = f"native kernels {result.native_ops}" if result.native_ops else "function bodies, no native kernels"
    sampler = f", sampler {result.sampler}" if result.sampler else ""
    for name, value in {
        "bundle": f"{result.bundle.name}, {result.bundle.family}, {result.bundle.parameters / 1e6:.2f} M parameters{sampler}",
        "device": f"{result.device}, {result.hardware}",
        "computes": f"{result.dtype}, {kernels}, ONNX Runtime {result.versions.get('onnxruntime', '')}{', CUDA graphs' if result.cuda_graph else ''}",
        "threads": f"{result.threads or 'one a core'}, {result.cores} cores for this process",
        "opened": f"in {result.open_ms:.0f} ms",
        "memory": _memory(result.memory, result.comparison),
        "a sample": _work(result.work),
        "machine": _peak(result.peak),
    }.items():
        facts.add_row(f"[bold]{name}[/]", escape(value))
    console.print(facts, highlight=False)
    table = Table(*COLUMNS, caption=CAPTION, caption_justify="left")
    for column in table.columns:
        column.justify = "right"
    for cell in result.cells:
        table.add_row(*_row(cell, result.comparison))
    console.print(table, highlight=False)
    for cell in result.cells:
        if cell.error is not None:
            console.print(f"[bold red]failed:[/] steps {cell.steps}, batch {cell.batch_size}\n  {escape(cell.error)}", highlight=False, soft_wrap=True)
    if result.comparison is not None:
        _show_comparison(console, result.comparison)


def _row(cell: Cell, comparison: Comparison | None) -> list[str]:
    head = [str(cell.steps), str(cell.batch_size)]
    if cell.median_ms is None:
        return [*head, "[bold red]failed[/]" if cell.error else "not reached", *[""] * (len(COLUMNS) - 3)]
    ratios = comparison.of(cell) if comparison else {}
    figures = []
    for name in ("median_ms", "p95_ms", "min_ms", "images_per_second"):
        text = _number(getattr(cell, name))
        figures.append(f"{text}\n×{ratios[name]:.2f}" if name in ratios else text)
    return [*head, *figures, _share(cell.product_share), _share(cell.copy_share), str(cell.runs)]


def _number(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}".rstrip(".")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _memory(memory: Memory, comparison: Comparison | None) -> str:
    parts = []
    if memory.process_opened is not None:
        parts.append(f"{memory.process_opened / 2**20:,.0f} MiB with the bundle open")
    if memory.process_peak is not None:
        ratio = f" (×{comparison.process_peak:.2f})" if comparison and comparison.process_peak else ""
        parts.append(f"{memory.process_peak / 2**20:,.0f} MiB at the peak{ratio}")
    if memory.device_peak is not None:
        parts.append(f"{memory.device_peak / 2**20:,.0f} MiB of the GPU's at the peak")
    return ", ".join(parts) or "not known here"


def _work(work: ModelCost) -> str:
    weights = f"{work.weight_bytes / 1e6:,.4g} MB of weights an evaluation"
    if work.step_gflop is None:
        return f"{weights}; operations not counted: {work.reason}"
    decode = f", {work.decode_gflop:,.4g} GFLOP to decode" if work.decode_gflop else ""
    uncounted = f"; without {', '.join(work.uncounted)}, which cannot be counted" if work.uncounted else ""
    return f"{work.step_gflop:,.4g} GFLOP an evaluation{decode}{uncounted}; {weights}"


def _peak(peak: MachinePeak) -> str:
    if peak.product_gflops is None or peak.copy_gb_per_second is None:
        return f"not measured: {peak.reason}"
    return f"{peak.product_gflops:,.0f} GFLOP/s in a product, {peak.copy_gb_per_second:,.1f} GB/s in a copy\n({peak.how})"


def _show_comparison(console: Console, comparison: Comparison) -> None:
    console.print(f"×: this run divided by '{escape(comparison.file)}' of {comparison.date}", highlight=False, soft_wrap=True)
    for difference in comparison.differences:
        console.print(f"[bold yellow]not the same:[/] {escape(difference)}", highlight=False, soft_wrap=True)
