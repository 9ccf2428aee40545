"""Adds click 8.2's CliRunner features to click 8.1, so that the command line tests run with the oldest supported click."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import click.testing

OLD = tuple(map(int, version("click").split(".")[:2])) < (8, 2)


class OldRunner(click.testing.CliRunner):
    """Accepts ``catch_exceptions`` in the constructor, and captures standard output and standard error separately."""

    def __init__(self, *, catch_exceptions: bool = True, **arguments: Any) -> None:
        super().__init__(mix_stderr=False, **arguments)  # type: ignore[call-arg]  # click 8.1 has it
        self.catch = catch_exceptions

    def invoke(self, cli: click.Command, args: Any = None, **arguments: Any) -> click.testing.Result:  # type: ignore[override]  # has the parameters that these tests use
        return super().invoke(cli, args, **{"catch_exceptions": self.catch} | arguments)


def complete_click() -> None:
    """Replace click 8.1's CliRunner, and let ``Result.output`` contain both streams."""
    if OLD:
        click.testing.CliRunner = OldRunner  # type: ignore[assignment,misc]  # a subclass takes its name
        click.testing.Result.output = property(lambda result: result.stdout + result.stderr)  # type: ignore[assignment,method-assign]  # a property like the one it replaces
