"""The boundary of the command lines: every error and every signal becomes one message on standard error and an exit code, without a traceback."""

from __future__ import annotations

import errno
import io
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from scm_runtime.cli.flag_names import with_flag_names
from scm_runtime.cli.signals import interruption, termination_as_interrupt
from scm_runtime.cli.streams import discard_output, encodable, is_broken, prepare_streams, say_error
from scm_runtime.common.interrupts import was_interrupted
from scm_runtime.common.memory import SMALLER_BATCH, is_out_of_memory
from scm_runtime.errors import InvalidArgumentError, ScmError

USAGE, FAILURE, BROKEN_PIPE = 2, 1, 141  # exit codes; the last is the shell's for SIGPIPE
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)  # what a stream that cannot be written to raises
REPORT = "This is an error in scm-runtime: please report it to the scm-runtime project, with the output of `scm-runtime doctor`."


class Command(click.Command):
    """A command whose errors are shown without a traceback, unless it gets ``--debug``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.context_settings = {"help_option_names": ["-h", "--help"], **self.context_settings}
        self.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, callback=_set_debug, help="Show the traceback of an error."))

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run the command as the process's program."""
        prepare_streams()
        with termination_as_interrupt():
            return super().main(*arguments, **options)

    def make_context(self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any) -> click.Context:
        """Parse the command line."""
        with exit_on_error(self, debug="--debug" in args):
            return super().make_context(info_name, args, parent, **extra)

    def get_help(self, ctx: click.Context) -> str:
        """Return the text of ``--help``."""
        return encodable(super().get_help(ctx))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with exit_on_error(self, debug=bool(ctx.meta.get("scm.debug"))):
            return super().invoke(ctx)


class Group(Command, click.Group):
    """A group of such commands. ``--debug`` may stand before or after the name of the command."""

    command_class = Command


def _set_debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        context.meta["scm.debug"] = True


@contextmanager
def exit_on_error(command: click.Command, *, debug: bool) -> Iterator[None]:
    """Turn exceptions into a message and an exit code.

    The exit code is 2 for a wrong argument or a path that does not exist, 130 for Ctrl-C, 143 and 129 for SIGTERM and SIGHUP, 141 if the reader of the output
    has gone, and 1 for all other errors.
    """
    try:
        yield
        sys.stdout.flush()  # now, while an error can be reported
    except (SystemExit, click.exceptions.Exit):
        raise
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        say_error(text.getvalue().rstrip())
        sys.exit(error.exit_code)
    except BaseException as error:  # noqa: BLE001 - this is the boundary of the process
        if debug:
            say_error("".join(traceback.format_exception(error)).rstrip())
        message, code = describe(error, command)
        if message:
            say_error(message)
        discard_output(*(stream for stream in (sys.stdout, sys.stderr) if is_broken(stream)))
        sys.exit(code)


def describe(error: BaseException, command: click.Command) -> tuple[str, int]:
    """Return the message and the exit code for an exception."""
    if was_interrupted(error):
        word, code = interruption()
        said = str(error) if isinstance(error, KeyboardInterrupt) else ""
        return f"{word}: {said}" if said else word, code
    if isinstance(error, ScmError):
        # Every "not found" error of the project is a FileNotFoundError too: bundles, checkpoints and repositories of the hub.
        usage = isinstance(error, InvalidArgumentError | FileNotFoundError)
        return f"Error: {with_flag_names(str(error), command)}", USAGE if usage else FAILURE
    if isinstance(error, MemoryError | ImportError) and is_out_of_memory(error):
        return f"Error: out of memory. {SMALLER_BATCH}, or raise the memory limit of this process or container.", FAILURE
    if isinstance(error, OSError):
        if error.errno == errno.EPIPE:
            return "", BROKEN_PIPE
        if error.filename is None and error.errno in FULL:  # files of ours raise OutputError
            return f"Error: cannot write the output: {error.strerror}", FAILURE
        return f"Error: {error}", FAILURE
    return f"Error: internal error: {type(error).__name__}: {error}\n{REPORT} --debug shows the traceback.", FAILURE
