"""What the commands share: options, types of parameters, exit codes, and how errors are shown. ``scm-export`` uses it too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from scm_runtime.common.memory import SMALLER_BATCH, is_out_of_memory
from scm_runtime.errors import InvalidArgumentError, ScmError

if TYPE_CHECKING:
    from click import ParamType as ParamType
else:

    class ParamType(click.ParamType):
        """``click.ParamType``, which is subscriptable only from click 8.4 on; click 8.1 is supported."""

        def __class_getitem__(cls, item: object) -> type[ParamType]:
            return cls


USAGE, FAILURE, INTERRUPTED = 2, 1, 130  # exit codes; 130 is the shell's: 128 + SIGINT


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn this project's errors into one message on stderr and an exit code, without a traceback.

    The exit code is 2 for a wrong argument or a path that does not exist, 130 for Ctrl-C, and 1 for all other errors.
    """
    try:
        yield
    except ScmError as error:
        click.echo(f"Error: {error}", err=True)
        # Every "not found" error of the project is a FileNotFoundError too: bundles, checkpoints and repositories of the hub.
        sys.exit(USAGE if isinstance(error, InvalidArgumentError | FileNotFoundError) else FAILURE)
    except (MemoryError, ImportError) as error:
        if not is_out_of_memory(error):
            raise
        click.echo(f"Error: out of memory. {SMALLER_BATCH}, or raise the memory limit of this process or container.", err=True)
        sys.exit(FAILURE)
    except KeyboardInterrupt as interrupt:
        click.echo(f"Interrupted{': ' * bool(str(interrupt))}{interrupt}", err=True)
        sys.exit(INTERRUPTED)


class IntegerList(ParamType[tuple[int, ...]]):
    """Integers separated by commas. With a ``minimum``, each must be at least that, and the list may be empty."""

    name = "integers"

    def __init__(self, minimum: int | None = None) -> None:
        self.minimum = minimum

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        text = str(value)
        try:
            numbers = () if self.minimum is not None and not text.strip() else tuple(int(part) for part in text.split(","))
            if self.minimum is not None and any(number < self.minimum for number in numbers):
                raise ValueError(numbers)
        except ValueError:
            bound = "" if self.minimum is None else f" of at least {self.minimum}"
            self.fail(f"must be one or more integers{bound}, separated by commas; got {text!r}", param, ctx)
        return numbers


device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda or cuda:N; auto uses the first GPU if one is available, else the CPU."
)
dtype_option = click.option("--dtype", default="auto", show_default=True, help="Graphs to run: fp32, fp16 or bf16; auto uses half precision on a GPU.")
native_ops_option = click.option(
    "--native-ops/--no-native-ops",
    default=None,
    help="Require the native library's kernels, or do not use them. By default they are used if they are available.",
)
revision_option = click.option("--revision", help="Branch, tag or commit of a repository on the Hugging Face hub. By default its main branch.")
sampler_option = click.option("--sampler", help="Sampler of a diffusion model: dpm-solver-2s, heun, …. By default the bundle's default sampler.")
skip_integrity_option = click.option("--skip-integrity", is_flag=True, help="Do not verify SHA-256 checksums, which takes time for large bundles.")
threads_option = click.option("--threads", type=int, help="Number of CPU threads; by default one per core.")
