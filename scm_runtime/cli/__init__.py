"""``scm-runtime``: the command line."""

from scm_runtime.cli.commands import main

__all__ = ["main"]
