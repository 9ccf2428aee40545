"""What ``scm-runtime generate`` does with an open Generator: one picture of all images, or a file for each as it is drawn."""

from __future__ import annotations

import os
import re
import string
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scm_runtime.errors import InvalidArgumentError
from scm_runtime.samples import EXPORT_A_DECODER, Samples, image_format_of

if TYPE_CHECKING:
    from scm_runtime.generator import Generator

FIELDS = ("seed", "index")
IN_A_FOLDER = "{seed:06d}.png"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while images were drawn; says which are there."""


@dataclass(frozen=True)
class Output:
    """Where images go, from ``-o``."""

    name: str
    """A picture's path; or, for a file an image, a path with {seed} or {index}."""
    each: bool
    """Whether every image gets a file."""
    shown: str
    """As the user wrote it."""

    @staticmethod
    def read(out: str) -> Output:
        """A path, a path with {seed} or {index}, or a folder, which ends with a slash; raises InvalidArgumentError."""
        if out.endswith("/"):
            return Output(out.replace("{", "{{").replace("}", "}}") + IN_A_FOLDER, each=True, shown=out)
        try:
            parsed = [(name, form, conversion) for _, name, form, conversion in string.Formatter().parse(out) if name is not None]
            fields = {name for name, _, _ in parsed}
            plain = all(conversion is None and re.fullmatch(r"(0?[0-9]{1,2})?d?", form or "") for _, form, conversion in parsed)
        except ValueError:  # an open brace
            fields, plain = {""}, True
        each = bool(fields)
        output = Output(out, each, out)
        try:
            if not fields <= set(FIELDS):
                raise ValueError(f"there is no field {{{min(fields - set(FIELDS))}}}")
            if not plain:  # two images might get one name
                raise ValueError("a field has a format that is none of integers")
            output.path(0, 0)
        except (LookupError, ValueError, AttributeError) as error:
            said = "{seed}, {index} and formats of integers such as {index:05d}"
            raise InvalidArgumentError(
                f"cannot name files by {out!r}: {error}. It may have the fields {said}; a brace that is none is written twice."
            ) from error
        if os.path.isdir(out):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
            raise InvalidArgumentError(f"'{out}' is a folder. Name a picture in it, or write '{out}/' for a file an image.")
        if not output.path(0, 0).suffix:
            raise InvalidArgumentError(f"'{out}' names no picture: end it in .png or .jpg, say, or write '{out}/' for a folder with a file an image.")
        image_format_of(output.path(0, 0))
        return output

    def path(self, index: int, seed: int) -> Path:
        """The file of one image; without fields that of all."""
        return Path(self.name.format(index=index, seed=seed))

    def check(self, seeds: Sequence[int]) -> None:
        """Raise InvalidArgumentError if two images of these seeds would get one file."""
        if self.each and len({self.path(index, seed) for index, seed in enumerate(seeds)}) < len(seeds):
            raise InvalidArgumentError(
                f"seed has one value twice, and {self.path(0, seeds[0])} can hold one image: put {{index}} into the name, as in '{{index}}.png'"
            )


@dataclass(frozen=True)
class Order:
    """What is to be drawn, as typed; None for what was not."""

    labels: int | str | list[int | str] | None
    seed: tuple[int, ...] | None
    num_images: int | None
    batch_size: int | None
    conditioning: Mapping[str, Any] | None
    steps: int | None
    sampler: str | None
    guidance_scale: float | None


def draw(generator: Generator, order: Order, output: Output, columns: int | None) -> str:
    """Draw and write; returns a line that says what was done.

    Without ``num_images`` it is one batch, as in a call of the Generator. With it, batches: one seed counts on over all of them, and labels are
    repeated until there are enough.

    Raises:
        InvalidArgumentError, InferenceError and so on: as Generator's call does.
        OutputError: a file cannot be written.
        Interrupted: by Ctrl-C. Each file that is there is whole.
    """
    if generator.manifest.output.kind != "image":
        raise InvalidArgumentError(f"the bundle {generator.manifest.name!r} makes latents, no pictures: it has no decoder. {EXPORT_A_DECODER}")
    if output.each and columns is not None:
        raise InvalidArgumentError(f"columns are those of a grid, and '{output.shown}' gets a file an image: leave --columns out")
    if order.seed is not None and len(order.seed) > 1:
        output.check(order.seed)
    start = time.perf_counter()
    written, batches = 0, []
    try:
        with _batches(generator, order) as drawn:
            for samples in drawn:
                # Without the pixels: a view would keep them all.
                batches.append(replace(samples, array=samples.array[:0].copy(), conditioning={}) if output.each else samples)
                for i in range(len(samples) if output.each else 0):
                    alone = replace(samples, array=samples.array[i : i + 1], seeds=samples.seeds[i : i + 1])
                    alone.save(output.path(written, samples.seeds[i]))
                    written += 1
        whole = _joined(batches)
        if not output.each:
            whole.save(output.path(0, 0), columns=columns)
    except KeyboardInterrupt as error:
        raise Interrupted(f"{written} of {order.num_images or 'the'} images are in '{output.shown}'" if written else "nothing was written") from error
    spent = time.perf_counter() - start if order.num_images else whole.timings.total
    return f"wrote {output.shown} ({_described(whole, order.sampler)}, {_duration(spent)})"


@contextmanager
def _batches(generator: Generator, order: Order) -> Iterator[Iterator[Samples]]:
    """The samples, batch by batch, while a bar on the terminal shows how far they are."""
    seed = order.seed[0] if order.seed is not None and len(order.seed) == 1 else order.seed
    if order.num_images is None:
        # Not a direct call: Ctrl-C ends the wait for a future at once, but not a step that this thread computes itself.
        future = generator.submit(
            order.labels,
            seed=seed,
            batch_size=order.batch_size,
            num_inference_steps=order.steps,
            sampler=order.sampler,
            guidance_scale=order.guidance_scale,
            conditioning=order.conditioning,
            output_type="np",
        )
        yield iter([future.result()])
        return
    labels = order.labels
    if isinstance(labels, list) and len(labels) < order.num_images:
        labels = list(islice(cycle(labels), order.num_images))
    stream = generator.stream(
        order.num_images,
        order.batch_size,
        class_labels=labels,
        seed=seed,
        num_inference_steps=order.steps,
        sampler=order.sampler,
        guidance_scale=order.guidance_scale,
        conditioning=order.conditioning,
        output_type="np",
    )
    with closing(stream), _bar(order.num_images) as advance:

        def counted() -> Iterator[Samples]:
            for samples in stream:
                yield samples
                advance(len(samples))

        yield counted()


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr if that is a terminal; what it gives is called with the number of images that came."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("images", total=total)
        yield lambda count: progress.advance(task, count)


def _joined(batches: Sequence[Samples]) -> Samples:
    """All samples in one, with the first batch's times."""
    if len(batches) == 1:
        return batches[0]
    array = np.concatenate([samples.array for samples in batches])
    return replace(batches[0], array=array, seeds=tuple(seed for samples in batches for seed in samples.seeds), conditioning={})


def _described(samples: Samples, sampler: str | None) -> str:
    first, last = samples.seeds[0], samples.seeds[-1]
    listed = f"{first}…{last}" if samples.seeds == tuple(range(first, last + 1)) else ", ".join(map(str, samples.seeds))
    seeds = f"seed {first}" if len(samples) == 1 else f"seeds {listed}"
    count = "1 sample" if len(samples) == 1 else f"{len(samples)} samples"
    evaluations = len(samples.timings.steps)
    return f"{count}, {seeds}, {f'{evaluations} steps' if sampler is None else f'{evaluations} evaluations by {sampler}'}"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def parse_labels(text: str, names: tuple[str, ...]) -> int | str | list[int | str]:
    """Labels as typed: a name where the bundle has one (names may be digits themselves), else a number; one alone serves every sample."""

    def parse(part: str) -> int | str:
        try:
            return part if part in names else int(part)
        except ValueError:
            return part

    labels = [parse(text.strip())] if text.strip() in names else [parse(part.strip()) for part in text.split(",")]
    return labels[0] if len(labels) == 1 else labels
