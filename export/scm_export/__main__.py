"""The program ``scm-export``; also ``python -m scm_export``."""

from scm_runtime.common.interrupts import exit_at_interrupt


def main() -> None:
    """Run the command line."""
    exit_at_interrupt()
    from scm_export.cli import main as program

    program(prog_name="scm-export")


if __name__ == "__main__":
    main()
