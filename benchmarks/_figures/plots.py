"""Plots of the results. matplotlib is imported only when a plot is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _figures.tables import OURS, milliseconds, ran

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS, COLUMNS = 9, 3  # maximum number of models per plot, and per row of it
COLORS = {
    "light": {"text": "#1f2328", "muted": "#59636e", "line": "#d1d9e0", "ours": "#0a6fd6", "bodies": "#7db3ec", "fp32": "#b4bcc6", "half": "#d9a441"},
    "dark": {"text": "#e6edf3", "muted": "#9198a1", "line": "#3d444d", "ours": "#4a9eff", "bodies": "#2f5f93", "fp32": "#656c76", "half": "#b08130"},
}


def peers(result: Mapping[str, Any], theme: str, path: Path, stamp: str) -> None:
    """Plot the latency of each peer at batch 1: one panel per model."""
    colors = COLORS[theme]
    rows = [row for row in result["figures"]["rows"].values() if row["batch_size"] == 1 and row["steps"] == 2 and ran(row)][:PANELS]
    lines = [rows[start : start + COLUMNS] for start in range(0, len(rows), COLUMNS)] or [[]]
    names = [list(dict.fromkeys(name for row in line for name in ran(row))) for line in lines]
    figure = _figure(3.1 * min(COLUMNS, len(rows) or 1) + 1.5, 0.3 + sum(0.4 + 0.26 * len(line) for line in names))
    grid = figure.add_gridspec(len(lines), min(COLUMNS, len(rows) or 1), height_ratios=[1 + len(line) for line in names])
    figure.suptitle(
        "Latency of two steps, batch 1; shorter is better. Blue: scm_runtime (pale: function bodies, bf16). Amber: others in half precision",
        x=0.01,
        ha="left",
        fontsize=8,
        color=colors["muted"],
    )
    for i, line in enumerate(lines):
        for j, row in enumerate(line):
            _panel(figure.add_subplot(grid[i, j]), row, names[i], colors, labelled=j == 0)
    _save(figure, path, stamp)


def _panel(axes: Any, row: Mapping[str, Any], names: list[str], colors: Mapping[str, str], *, labelled: bool) -> None:
    found = ran(row)
    top = max(one["median_ms"] for one in found.values())
    for y, name in enumerate(names):
        if name not in found:
            axes.text(0.01 * top, y, "–", va="center", color=colors["muted"], fontsize=8)
            continue
        value = found[name]["median_ms"]
        axes.barh(y, value, height=0.72, color=colors[_kind(name, found[name]["dtype"])])
        axes.text(value + 0.02 * top, y, milliseconds(value), va="center", color=colors["text"], fontsize=8, fontweight="bold" if name == OURS else "normal")
    axes.set_title(row["title"], fontsize=9, color=colors["text"], loc="left")
    axes.set_yticks(range(len(names)), names if labelled else [""] * len(names), fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.3 * top)
    _bare(axes, colors)


def teacher(result: Mapping[str, Any], theme: str, path: Path, stamp: str) -> None:
    """Plot the time of one sample relative to the teacher's: teacher, two steps, one step."""
    colors = COLORS[theme]
    rows = [row for row in result["figures"].values() if row["status"] == "ok"]
    figure = _figure(7.2, 0.3 + 0.8 * max(1, len(rows)))
    axes = figure.add_subplot(1, 1, 1)
    for index, row in enumerate(rows):
        whole = next(name for name in row["median_ms"] if name.endswith("evaluations"))
        for line, (name, color) in enumerate(((whole, "fp32"), ("2 steps", "bodies"), ("1 step", "ours"))):
            y, value = 3.7 * index + line, row["median_ms"][name]
            what = f"teacher, {whole}" if name == whole else f"{name}, {row['times_as_fast'][name]:.0f}× as fast"
            axes.barh(y, value / row["median_ms"][whole], height=0.8, color=colors[color])
            axes.text(value / row["median_ms"][whole] + 0.01, y, f"{milliseconds(value)}   {what}", va="center", fontsize=8, color=colors["text"])
    axes.set_xlim(0, 1.45)
    axes.set_ylim(3.7 * len(rows) - 1.2, -0.8)
    axes.set_yticks([3.7 * index + 1 for index in range(len(rows))], [row["title"] for row in rows], fontsize=9)
    _bare(axes, colors)
    _save(figure, path, stamp)


def _kind(name: str, dtype: str) -> str:
    if name == OURS:
        return "ours"
    if name.startswith(OURS):
        return "bodies"
    return "fp32" if dtype == "fp32" else "half"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _bare(axes: Any, colors: Mapping[str, str]) -> None:
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(colors["line"])
    axes.set_xticks([])
    axes.set_facecolor("none")
    axes.tick_params(colors=colors["text"], length=0)


def _save(figure: Figure, path: Path, stamp: str) -> None:
    """Write the same bytes for the same results: no date, no random names. A PNG gets an opaque background."""
    import matplotlib as mpl

    if path.suffix == ".png":
        figure.savefig(path, dpi=150, facecolor="#0d1117" if "dark" in path.stem else "white")
        return
    with mpl.rc_context({"svg.hashsalt": "scm-runtime", "svg.fonttype": "path"}):
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Description": stamp})


PLOTS: dict[str, tuple[str, Callable[[Mapping[str, Any], str, Path, str], None]]] = {
    "peers": ("peers", peers),
    "peers-cuda": ("peers-cuda", peers),
    "teacher": ("teacher", teacher),
}
"""By file name: the results that a plot shows, and the function that draws it."""
