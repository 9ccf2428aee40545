"""README's tables and plots, from the results.

    python benchmarks/figures.py             writes them
    python benchmarks/figures.py --check     writes nothing; fails where they are not what the results give

A table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; a plot in docs/images, for a light and a dark page, says which results it was
drawn from. Checking needs no more than the standard library and click.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import click
from _figures.plots import PLOTS
from _figures.tables import TABLES

ROOT = Path(__file__).parents[1]
THEMES = ("light", "dark")


def read_results(folder: Path) -> dict[str, Any]:
    """The results there are, by name; those of a further machine as FOLDER/NAME."""
    return {path.relative_to(folder).with_suffix("").as_posix(): json.loads(path.read_text("utf-8")) for path in sorted(folder.rglob("*.json"))}


def with_tables(text: str, results: dict[str, Any]) -> str:
    """The README with every table renewed whose results there are.

    Raises:
        ValueError: a table has no place in it.
    """
    for name, (source, table) in TABLES.items():
        if source not in results:
            continue
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise ValueError(f"README must have the lines '{begin}' and '{end}', between which the table of {source}.json stands")
        text = f"{before}{begin}\n{table(results[source])}\n{end}{after}"
    return text


def stamp(result: Any) -> str:
    """Names the results that a plot was drawn from."""
    return "results " + hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]


def stale(readme: Path, images: Path, results: dict[str, Any]) -> list[str]:
    """What is not what the results give."""
    text = readme.read_text("utf-8")
    found = [str(readme)] if with_tables(text, results) != text else []
    for name, (source, _) in PLOTS.items():
        for theme in THEMES if source in results else ():
            path = images / f"{name}-{theme}.svg"
            if not path.is_file() or stamp(results[source]) not in path.read_text("utf-8"):
                found.append(str(path))
    return found


@click.command(help=__doc__.split("\n")[0])
@click.option("--check", is_flag=True, help="Write nothing; fail where something is not what the results give.")
@click.option("--readme", type=click.Path(path_type=Path, exists=True), default=ROOT / "README.md")
@click.option("--images", type=click.Path(path_type=Path), default=ROOT / "docs" / "images")
@click.option("--results", "folder", type=click.Path(path_type=Path, exists=True), default=Path(__file__).parent / "results")
@click.option("--png", is_flag=True, help="Also draw each plot as a PNG beside it, to look at.")
def main(check: bool, readme: Path, images: Path, folder: Path, png: bool) -> None:
    results = read_results(folder)
    try:
        if check:
            if names := stale(readme, images, results):
                raise click.ClickException(f"not what {folder} gives: {', '.join(names)}. Renew them: python benchmarks/figures.py")
            return
        readme.write_text(with_tables(readme.read_text("utf-8"), results), "utf-8")
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
