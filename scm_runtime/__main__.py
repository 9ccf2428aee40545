"""The program ``scm-runtime``; also ``python -m scm_runtime``."""

from scm_runtime.common.interrupts import exit_at_interrupt


def main() -> None:
    """Run the command line."""
    exit_at_interrupt()
    from scm_runtime.cli import main as program

    program(prog_name="scm-runtime")


if __name__ == "__main__":
    main()
