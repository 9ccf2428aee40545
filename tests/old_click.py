"""What click 8.1's CliRunner lacks of those from 8.2 on, so that the tests of the command lines run at the declared floor."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import click.testing

OLD = tuple(map(int, version("click").split(".")[:2])) < (8, 2)


class OldRunner(click.testing.CliRunner):
    """Takes ``catch_exceptions`` where it is made, and keeps standard output and error apart."""

    def __init__(self, *, catch_exceptions: bool = True, **arguments: Any) -> None:
        super().__init__(mix_stderr=False, **arguments)  # type: ignore[call-arg]  # click 8.1 has it
        self.catch = catch_exceptions

    def invoke(self, cli: click.Command, args: Any = None, **arguments: Any) -> click.testing.Result:  # type: ignore[override]  # as it is called here
        return super().invoke(cli, args, **{"catch_exceptions": self.catch} | arguments)


def complete_click() -> None:
    """Put the class above in the place of click 8.1's, and both streams into a result's ``output``."""
    if OLD:
        click.testing.CliRunner = OldRunner  # type: ignore[assignment,misc]  # a subclass takes its name
        click.testing.Result.output = property(lambda result: result.stdout + result.stderr)  # type: ignore[assignment,method-assign]  # a property like the one it replaces
