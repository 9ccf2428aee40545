"""Printed output of ``scm-runtime bench``: a result as tables on stdout, and a progress bar on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.text import Text

from scm_runtime.bench.cells import Progress
from scm_runtime.bench.result import Cell, Comparison, MachinePeak, Memory, ModelCost, Result
from scm_runtime.cli.tables import BAD, OutputConsole, facts_table, print_table, progress_bar

COLUMNS = ("steps", "batch", "median\nms", "p95\nms", "min\nms", "images/s", "of\nmatmul", "of\ncopy", "runs")
CAPTION = "of matmul, of copy: share of the machine's measured peak"


@contextmanager
def bench_progress() -> Iterator[Progress]:
    """Yield a function that shows the current measurement and the completed share of all, on stderr if that is a terminal."""
    # Redrawn between calls only: a background thread would do so during a measured call.
    with progress_bar(1.0, "{task.percentage:.0f} %", auto_refresh=False) as update:
        yield lambda what, part: update(description=what, completed=part, refresh=True)


def show_result(result: Result) -> None:
    """Print a result, with its ratios to an earlier one if it was compared."""
    console = OutputConsole()
    kernels = f"native kernels {result.native_ops}" if result.native_ops else "function bodies, no native kernels"
    sampler = f", sampler {result.sampler}" if result.sampler else ""
    facts = {
        "bundle": f"{result.bundle.name}, {result.bundle.family}, {result.bundle.parameters / 1e6:.2f} M parameters{sampler}",
        "device": f"{result.device}, {result.hardware}",
        "computes": f"{result.dtype}, {kernels}, ONNX Runtime {result.versions.get('onnxruntime', '')}{', CUDA graphs' if result.cuda_graph else ''}",
        "threads": f"{result.threads or 'one per core'}, {result.cores} cores for this process",
        "opened": f"in {result.open_ms:.0f} ms",
        "memory": _memory(result.memory, result.comparison),
        "per sample": _cost(result.work),
        "machine": _peak(result.peak),
    }
    console.print(facts_table(facts))
    print_table(console, COLUMNS, [_row(cell, result.comparison) for cell in result.cells], caption=CAPTION, right=COLUMNS)
    for cell in result.cells:
        if cell.error is not None:
            console.write_line(Text("failed:", BAD), f" steps {cell.steps}, batch {cell.batch_size}\n  {cell.error}")
    if result.comparison is not None:
        _show_comparison(console, result.comparison)


def _row(cell: Cell, comparison: Comparison | None) -> list[str | Text]:
    head: list[str | Text] = [str(cell.steps), str(cell.batch_size)]
    if cell.median_ms is None:
        return [*head, Text("failed", BAD) if cell.error else "not reached", *[""] * (len(COLUMNS) - 3)]
    ratios = comparison.of(cell) if comparison else {}
    figures = []
    for name in ("median_ms", "p95_ms", "min_ms", "images_per_second"):
        text = _number(getattr(cell, name))
        figures.append(f"{text}\n×{ratios[name]:.2f}" if name in ratios else text)
    return [*head, *figures, _share(cell.matmul_share), _share(cell.copy_share), str(cell.runs)]


def _number(value: float) -> str:
    """Format with at least four significant digits."""
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
        parts.append(f"{memory.device_peak / 2**20:,.0f} MiB of GPU memory at the peak")
    return ", ".join(parts) or "not known on this system"


def _cost(cost: ModelCost) -> str:
    weights = f"{cost.weight_bytes / 1e6:,.4g} MB of weights per evaluation"
    if cost.step_gflop is None:
        return f"{weights}; operations not counted: {cost.reason}"
    decode = f", {cost.decode_gflop:,.4g} GFLOP to decode" if cost.decode_gflop else ""
    uncounted = f"; without {', '.join(cost.uncounted)}, which cannot be counted" if cost.uncounted else ""
    return f"{cost.step_gflop:,.4g} GFLOP per evaluation{decode}{uncounted}; {weights}"


def _peak(peak: MachinePeak) -> str:
    if peak.matmul_gflops is None or peak.copy_gb_per_second is None:
        return f"not measured: {peak.reason}"
    return f"{peak.matmul_gflops:,.0f} GFLOP/s in matrix products, {peak.copy_gb_per_second:,.1f} GB/s in copying\n({peak.how})"


def _show_comparison(console: OutputConsole, comparison: Comparison) -> None:
    console.write_line(f"×: this run divided by '{comparison.file}' of {comparison.date}")
    for difference in comparison.differences:
        console.write_line(Text("different: ", "bold yellow"), difference)
