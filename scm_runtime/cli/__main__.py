"""``python -m scm_runtime.cli``."""

from scm_runtime.cli.commands import main

main(prog_name="scm-runtime")
