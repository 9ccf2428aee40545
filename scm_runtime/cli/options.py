"""What the commands share: options and types of parameters. ``scm-export`` uses it too."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click import ParamType as ParamType
else:

    class ParamType(click.ParamType):
        """``click.ParamType``, which is subscriptable only from click 8.4 on; click 8.1 is supported."""

        def __class_getitem__(cls, item: object) -> type[ParamType]:
            return cls


class NumberList(ParamType[tuple[float, ...]]):
    """Numbers separated by commas."""

    name = "numbers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"must be one or more numbers, separated by commas; got {value!r}", param, ctx)


class Seconds(click.FloatRange):
    """A time in seconds, at least 0."""

    name = "seconds"

    def __init__(self) -> None:
        super().__init__(0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):  # in no range, though click accepts it
            self.fail(f"must be a number of seconds, got {value}", param, ctx)
        return seconds


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
