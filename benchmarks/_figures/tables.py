"""Results as tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

OURS = "scm_runtime"
COSTS_OF = ("XXS, batch 1", "digits, batch 1")  # rows whose memory and start-up are shown, by preference


def milliseconds(value: float) -> str:
    """Format milliseconds with three significant digits, in ms or s."""
    if value >= 1000:
        return f"{value / 1000:.{0 if value >= 100_000 else 1 if value >= 10_000 else 2}f} s"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} ms"


def size_of(count: float | None) -> str:
    """Format a number of bytes in MB or GB."""
    if count is None:
        return "–"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. The first column is left-aligned, the others right-aligned."""
    aligned = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, aligned, *rows))


def ran(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the peers of a row that were measured."""
    return {name: found for name, found in row["peers"].items() if found["status"] == "ok"}


def fastest_other(row: Mapping[str, Any], dtype: str | None = None) -> tuple[str, float] | None:
    """Return the fastest peer of a dtype (None for any) other than scm_runtime, and its time divided by that of scm_runtime."""
    others = {
        name: found["times_as_long"]
        for name, found in ran(row).items()
        if not name.startswith(OURS) and "times_as_long" in found and dtype in (None, found["dtype"])
    }
    if not others:
        return None
    name = min(others, key=lambda other: others[other])
    return name, others[name]


def machine_line(result: Mapping[str, Any]) -> str:
    """Return the machine, package versions and dates of the results as one line."""
    about, rows = result["machine"], result["figures"]["rows"].values()
    versions: dict[str, str] = {}
    for row in rows:
        for found in ran(row).values():
            versions |= found["versions"]
    dates = sorted({date for row in rows for found in ran(row).values() if (date := found.get("date", row.get("date")))})
    gpu = (result["figures"].get("gpu") or {}).get("gpu")
    threads = next(iter(rows))["threads"]
    where = gpu or f"{about['cpu'].replace('(R)', '')}, {threads} core{'s' * (threads > 1)}"
    when = " to ".join(dict.fromkeys((*dates[:1], *dates[-1:])))
    return f"{where}; Python {about['python']}, {', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}; {when}."


def latency(result: Mapping[str, Any]) -> str:
    """Table of median latencies: one row per model and batch size, one column per peer."""
    rows = result["figures"]["rows"]
    names = [name for name in _all_peers(rows) if any(name in ran(row) for row in rows.values())]
    header = ["model", "batch", *names, f"fastest fp32 peer / {OURS}"]
    if result["figures"].get("gpu"):
        header[-1] = f"fastest peer / {OURS}"
    lines = []
    for row in rows.values():
        found = ran(row)
        best = min((one["median_ms"] for one in found.values()), default=0.0)
        cells = {name: milliseconds(one["median_ms"]) for name, one in found.items()}
        cells |= {name: f"**{cells[name]}**" for name, one in found.items() if one["median_ms"] == best}
        other = fastest_other(row, None if result["figures"].get("gpu") else "fp32")
        steps = "" if row["steps"] == 2 else f", {row['steps']} step{'s' * (row['steps'] > 1)}"
        ratio = "–" if other is None else f"{other[1]:.2f}"
        lines.append([row["title"] + steps, str(row["batch_size"]), *(cells.get(name, "–") for name in names), ratio])
    return "\n".join([markdown(header, lines), "", machine_line(result), *_notes(result)])


def costs(result: Mapping[str, Any]) -> str:
    """Table of memory, start-up time, install size and error of each peer, for one model."""
    rows = result["figures"]["rows"]
    name = next((name for name in COSTS_OF if name in rows), next(iter(rows)))
    lines = [
        [
            peer,
            milliseconds(found["median_ms"]),
            milliseconds(found["p95_ms"]),
            size_of(found["peak_bytes"]),
            f"{found['cold_start_s']:.1f} s",
            size_of(found["install_bytes"]),
            f"{found['error_share']:.1g}",
            found["settings"],
        ]
        for peer, found in ran(rows[name]).items()
    ]
    row = rows[name]
    header = [
        f"{row['title']}, batch {row['batch_size']}",
        "median",
        "95th percentile",
        "peak memory",
        "time to first result",
        "install size",
        "error",
        "settings",
    ]
    return markdown(header, lines)


def teacher(result: Mapping[str, Any]) -> str:
    """Table of the teacher's sampler against one and two steps of the student."""
    lines, reasons = [], []
    for row in result["figures"].values():
        if row["status"] != "ok":
            reasons.append(f"{row['title']}: {row['reason']}.")
            continue
        whole = next(name for name in row["median_ms"] if name.endswith("evaluations"))
        fast = row["times_as_fast"]
        two, one = (f"{milliseconds(row['median_ms'][name])} ({fast[name]:.0f}×)" for name in ("2 steps", "1 step"))
        lines.append([row["title"], milliseconds(row["median_ms"][whole]), two, one])
    about = result["machine"]
    dates = sorted({row["date"] for row in result["figures"].values() if row["status"] == "ok"})
    cores = f"{about['cores']} core{'s' * (about['cores'] > 1)}"
    line = f"{about['cpu'].replace('(R)', '')}, {cores}; onnxruntime {about.get('onnxruntime', '?')}; {', '.join(dates)}."
    return "\n".join([markdown(["one sample", "teacher, 63 evaluations", "2 steps", "1 step"], lines), "", line, *reasons])


def quality(record: Mapping[str, Any]) -> str:
    """Table of the results of examples/digits/evaluate.py: one row per sampler.

    Of the ways in which a sampler was run (PyTorch or a bundle), the row shows the one with the most sets; PyTorch if there are equally many.
    """
    figures = {"recognised": "classified as requested", "frechet": "Fréchet distance", "precision": "precision", "recall": "recall", "copies": "copies"}
    digits = {name: 4 if name == "copies" else 3 for name in figures}
    lines = [["real digits (1 000 against the other 3 000)", "", *(f"{record['real'][name]:.{digits[name]}f}" for name in figures)]]
    for sampler in dict.fromkeys(row["sampler"] for row in record["rows"]):
        row = max((row for row in record["rows"] if row["sampler"] == sampler), key=lambda row: row["sets"])
        cells = []
        for name in figures:
            mean, half = (value if value is None else f"{value:.{digits[name]}f}" for value in row["figures"][name])
            cells.append(f"{mean}" if half is None else f"{mean} ± {half}")
        lines.append([sampler, f"{row['sets']}, {'PyTorch' if row['through'] == 'PyTorch' else row['through'] + ' bundle'}", *cells])
    changes = "; ".join(f"{dtype} {max(found.values()):.2%} ({max(found, key=found.__getitem__)})" for dtype, found in record["export_changes"].items())
    line = f"Largest relative change of a metric by the export, over all rows and all metrics except copies: {changes}."
    return "\n".join([markdown([f"{record['samples']:,} samples per set".replace(",", " "), "sets, source", *figures.values()], lines), "", line])


def _all_peers(rows: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for row in rows.values() for name in row["peers"]))


def _notes(result: Mapping[str, Any]) -> list[str]:
    """Return one line for each peer that was not measured, with the reason."""
    missing: dict[str, None] = {}
    batch_sizes: dict[tuple[str, str, str], list[str]] = {}
    for row in result["figures"]["rows"].values():
        for name, found in row["peers"].items():
            if found["status"] == "missing":
                missing[f"{name}: {found['reason']}"] = None
            elif found["status"] in ("failed", "wrong", "skipped", "not measured"):
                batch_sizes.setdefault((name, row["title"], found["reason"]), []).append(str(row["batch_size"]))
    said = [f"{name}, {title}, batch {' and '.join(sizes)}: {reason}" for (name, title, reason), sizes in batch_sizes.items()]
    return [f"Not measured: {note}." for note in (*missing, *said, *result["figures"].get("not_measured", {}).values())]
