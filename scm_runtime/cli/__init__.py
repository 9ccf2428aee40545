"""``scm-runtime``: the command line."""

from scm_runtime.cli.commands import IntegerList, clean_errors, main

__all__ = ["IntegerList", "clean_errors", "main"]
