"""``python -m scm_runtime``."""

from scm_runtime.cli import main

main(prog_name="scm-runtime")
