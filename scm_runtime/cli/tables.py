"""Terminal output that several commands share: tables, facts, and a progress bar. Text from files is shown with control characters escaped."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from rich.box import HEAVY_HEAD, Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scm_runtime.common.message_text import escape_controls

NARROW = 70  # columns; a narrower terminal gets lists instead of tables
BOLD, BAD, GOOD = "bold", "bold red", "green"  # rich's styles


class OutputConsole(Console):
    """rich's console on standard output or standard error. It raises BrokenPipeError, as other streams do, instead of ending the process."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False)
        if self.width < 1:  # some terminals and containers set COLUMNS=0
            self.width = 80

    def on_broken_pipe(self) -> None:
        """Called while BrokenPipeError is handled."""
        raise

    def write_line(self, *parts: str | Text) -> None:
        """Print a line, which the terminal wraps."""
        self.print(Text.assemble(*map(as_text, parts)), soft_wrap=True)


def as_text(cell: str | Text) -> Text:
    """Text for rich without markup, with control characters escaped. A Text is our own and stays as it is."""
    return cell if isinstance(cell, Text) else Text(escape_controls(cell))


def facts_table(facts: Mapping[str, str | Text]) -> Table:
    """Return a table with one row per fact: its name in bold, and its value."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(escape_controls(name), BOLD), as_text(value))
    return table


def print_table(
    console: OutputConsole,
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    title: str | None = None,
    caption: str | None = None,
    right: Sequence[str] = (),
    wrap: Sequence[str] | None = None,
    box: Box = HEAVY_HEAD,
) -> None:
    """Print a table, or in a narrow terminal a list with the columns of each row below each other.

    Args:
        console: where to print.
        columns: headers.
        rows: a cell for each column.
        title: line above the table.
        caption: line below the table.
        right: columns of numbers, which are aligned to the right.
        wrap: columns whose text may be wrapped; by default all but numbers.
        box: lines of the table.
    """
    if console.width < NARROW:
        for line in (title, caption):
            if line:
                console.write_line(line)
        for row in rows:
            console.print(facts_table(dict(zip((name.replace("\n", " ") for name in columns), row, strict=True))))
            console.print()
        return
    table = Table(title=title, caption=caption, caption_justify="left", box=box, padding=(0, 1, 0, 0) if box is not HEAVY_HEAD else (0, 1))
    for name in columns:
        fixed = name in right if wrap is None else name not in wrap
        table.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=fixed)
    for row in rows:
        table.add_row(*map(as_text, row))
    console.print(table)


class UpdateProgress(Protocol):
    """Changes a progress bar: its text, the completed amount, or by how much that advances. Omitted arguments stay as they are."""

    def __call__(self, *, description: str | None = None, completed: float | None = None, advance: float | None = None, refresh: bool = False) -> None: ...


@contextmanager
def progress_bar(total: float, completed: str, *, auto_refresh: bool = True) -> Iterator[UpdateProgress]:
    """Show a progress bar on stderr while the block runs, if stderr is a terminal.

    Args:
        total: value of ``completed`` at the end.
        completed: rich's format string for the progress: ``"{task.percentage:.0f} %"``.
        auto_refresh: redraw the bar in a background thread, also between updates.
    """
    if not sys.stderr.isatty():
        yield lambda **_: None
        return
    from rich.progress import BarColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), completed, TimeRemainingColumn())
    with Progress(*columns, console=OutputConsole(stderr=True), transient=True, auto_refresh=auto_refresh) as progress:
        yield partial(progress.update, progress.add_task("", total=total))
