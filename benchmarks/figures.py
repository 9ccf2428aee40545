"""Write the tables of docs/benchmarks.md and its plots from the results.

    python benchmarks/figures.py             writes them
    python benchmarks/figures.py --check     writes nothing; fails if they do not match the results

A table is placed between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. A plot is a pair of files in docs/images, for light and dark pages; each file
records the hash of the results that it was drawn from. Checking needs only the standard library and click.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from _figures.aims import aims
from _figures.plots import PLOTS
from _figures.tables import costs, latency, quality, teacher

ROOT = Path(__file__).parents[1]
THEMES = ("light", "dark")
TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "peers": ("peers", latency),
    "peers-costs": ("peers", costs),
    "aims": ("peers", aims),
    "peers-cuda": ("peers-cuda", latency),
    "teacher": ("teacher", teacher),
    "quality": ("quality", quality),
    "quality-sct": ("quality-sct", quality),
    "peers-zen4": ("amd-zen4/peers", latency),
    "aims-zen4": ("amd-zen4/peers", aims),
    "peers-amx": ("intel-amx/peers", latency),
    "aims-amx": ("intel-amx/peers", aims),
    "teacher-amx": ("intel-amx/teacher", teacher),
}
"""By marker name: the results that a table shows, and the function that formats it."""


def read_results(folder: Path) -> dict[str, Any]:
    """Return all results by name; those of another machine are named FOLDER/NAME. Left out are those whose first row is not measured yet."""
    found = {path.relative_to(folder).with_suffix("").as_posix(): json.loads(path.read_text("utf-8")) for path in sorted(folder.rglob("*.json"))}
    return {name: result for name, result in found.items() if result.get("figures", {}).get("rows") != {}}


def with_tables(text: str, results: dict[str, Any]) -> str:
    """Return the page with every table replaced for which there are results.

    Raises:
        ValueError: the page lacks the markers of a table.
    """
    for name, (source, table) in TABLES.items():
        if source not in results:
            continue
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise ValueError(f"the page must contain the lines '{begin}' and '{end}', which enclose the table of {source}.json")
        text = f"{before}{begin}\n{table(results[source])}\n{end}{after}"
    return text


def stamp(result: Any) -> str:
    """Return the text that identifies the results a plot was drawn from."""
    return "results " + hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]


def stale_files(page: Path, images: Path, results: dict[str, Any]) -> list[str]:
    """Return the paths of the page and the plots that do not match the results."""
    text = page.read_text("utf-8")
    found = [str(page)] if with_tables(text, results) != text else []
    for name, (source, _) in PLOTS.items():
        for theme in THEMES if source in results else ():
            path = images / f"{name}-{theme}.svg"
            if not path.is_file() or stamp(results[source]) not in path.read_text("utf-8"):
                found.append(str(path))
    return found


@click.command(help=__doc__.split("\n")[0])
@click.option("--check", is_flag=True, help="Write nothing; fail if a table or plot does not match the results.")
@click.option("--page", type=click.Path(path_type=Path, exists=True), default=ROOT / "docs" / "benchmarks.md")
@click.option("--images", type=click.Path(path_type=Path), default=ROOT / "docs" / "images")
@click.option("--results", "folder", type=click.Path(path_type=Path, exists=True), default=Path(__file__).parent / "results")
@click.option("--png", is_flag=True, help="Also draw each plot as a PNG, for a quick look.")
def main(check: bool, page: Path, images: Path, folder: Path, png: bool) -> None:
    results = read_results(folder)
    try:
        if check:
            if names := stale_files(page, images, results):
                raise click.ClickException(f"not what the results in {folder} give: {', '.join(names)}. Write them again: python benchmarks/figures.py")
            return
        page.write_text(with_tables(page.read_text("utf-8"), results), "utf-8")
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    images.mkdir(parents=True, exist_ok=True)
    for name, (source, plot) in PLOTS.items():
        for theme in THEMES if source in results else ():
            plot(results[source], theme, images / f"{name}-{theme}.svg", stamp(results[source]))
            if png:
                plot(results[source], theme, images / f"{name}-{theme}.png", "")


if __name__ == "__main__":
    main()
