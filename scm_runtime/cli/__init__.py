"""``scm-runtime``: the command line."""

from scm_runtime.cli.commands import IntegerList, exit_on_error, main

__all__ = ["IntegerList", "exit_on_error", "main"]
