"""Terminal output that several commands share: a table of facts, and a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def facts_table(facts: Mapping[str, str]) -> Table:
    """Return a table with one row per fact: its name in bold, and its value."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(f"[bold]{name}[/]", escape(value))
    return table


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
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=auto_refresh) as progress:
        yield partial(progress.update, progress.add_task("", total=total))
