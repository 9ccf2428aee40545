"""``python -m scm_export``."""

from scm_export.cli import main

main(prog_name="scm-export")
