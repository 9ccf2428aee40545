"""``scm-runtime generate``: sample with an open Generator, and write one image of all samples or a file for each. ``commands.py`` has its options."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec import Struct

from scm_runtime.errors import InvalidArgumentError
from scm_runtime.samples import EXPORT_A_DECODER, Samples, listed_seeds

if TYPE_CHECKING:
    from scm_runtime.cli.output_files import OutputPattern
    from scm_runtime.generator import Generator


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during sampling. The message says how many images were written."""


@dataclass(frozen=True)
class GenerateOptions:
    """Arguments of a Generator's call, from the command line; None for those that were not given."""

    labels: int | str | list[int | str] | None
    seed: tuple[int, ...] | None
    num_images: int | None
    batch_size: int | None
    conditioning: Mapping[str, Any] | None
    steps: int | None
    timesteps: tuple[float, ...] | None
    sampler: str | None
    guidance_scale: float | None
    timeout: float | None


class Written(Struct, frozen=True):
    """What ``scm-runtime generate`` wrote; the JSON document of ``--json``."""

    out: str
    """The value of ``-o``."""
    files: tuple[str, ...]
    """Paths of the image files: one of all samples, or one for each sample."""
    seeds: tuple[int, ...]
    class_labels: tuple[int, ...] | None
    """Class of each sample; None if the bundle has no classes."""
    evaluations: int
    """Evaluations of the network per sample."""
    sampler: str | None
    """None for the bundle's default."""
    seconds: float
    """Time of the batch, or of all batches and files with ``--num-images``."""

    def to_json(self) -> bytes:
        """Encode as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)


def generate_images(generator: Generator, options: GenerateOptions, output: OutputPattern, columns: int | None) -> Written:
    """Sample, write the image files, and return what was written.

    Without ``num_images`` this is one batch, as in a call of the Generator. With it, samples are generated in batches: a single seed is the first of
    consecutive ones over all batches, and labels are repeated until there are enough.

    Raises:
        InvalidArgumentError, InferenceError and others: see Generator's call.
        OutputError: a file cannot be written.
        Interrupted: by Ctrl-C. Files that exist are complete.
    """
    if generator.manifest.output.kind != "image":
        raise InvalidArgumentError(f"the bundle {generator.manifest.name!r} makes latents, not images: it has no decoder. {EXPORT_A_DECODER}")
    if output.file_per_sample and columns is not None:
        raise InvalidArgumentError(f"columns are for a grid, but '{output.shown}' gets one file per image: leave --columns out")
    if options.seed is not None and len(options.seed) > 1:
        output.check(options.seed)
    start = time.perf_counter()
    files: list[str] = []
    batches: list[Samples] = []
    try:
        with _batches(generator, options) as sampled:
            for samples in sampled:
                if not output.file_per_sample:
                    batches.append(samples)
                    continue
                for i, seed in enumerate(samples.seeds):
                    path = replace(samples, array=samples.array[i : i + 1], seeds=(seed,)).save(output.path(len(files), seed))
                    files.append(str(path))
                batches.append(replace(samples, array=samples.array[:0].copy()))  # a copy: a view would keep all pixels in memory
        merged = _concatenate(batches)
        if not output.file_per_sample:
            files.append(str(merged.save(output.path(0, 0), columns=columns)))
    except KeyboardInterrupt as error:
        raise Interrupted(f"{len(files)} of {options.num_images or 'the'} images are in '{output.shown}'" if files else "nothing was written") from error
    seconds = time.perf_counter() - start if options.num_images else merged.timings.total
    labels = None if generator.manifest.labels is None else merged.conditioning.get(generator.manifest.labels.name)
    return Written(
        out=_as_unicode(output.shown),
        files=tuple(map(_as_unicode, files)),
        seeds=merged.seeds,
        class_labels=None if labels is None else tuple(labels.tolist()),
        evaluations=len(merged.timings.steps),
        sampler=options.sampler,
        seconds=seconds,
    )


def _as_unicode(path: str) -> str:
    """Escape the bytes of a path that are not UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode()


@contextmanager
def _batches(generator: Generator, options: GenerateOptions) -> Iterator[Iterator[Samples]]:
    """Yield an iterator over batches of samples, and show a progress bar on a terminal if there may be several batches."""
    arguments: dict[str, Any] = {
        "seed": options.seed[0] if options.seed is not None and len(options.seed) == 1 else options.seed,
        "num_inference_steps": options.steps,
        "timesteps": options.timesteps,
        "sampler": options.sampler,
        "guidance_scale": options.guidance_scale,
        "conditioning": options.conditioning,
        "timeout": options.timeout,
        "output_type": "np",
    }
    if options.num_images is None:
        # Not a direct call: Ctrl-C interrupts the wait for a future immediately, but not a step that this thread runs itself.
        yield iter([generator.submit(options.labels, batch_size=options.batch_size, **arguments).result()])
        return
    from scm_runtime.cli.tables import progress_bar  # rich takes a while to import

    labels = options.labels
    if isinstance(labels, list) and len(labels) < options.num_images:
        labels = list(islice(cycle(labels), options.num_images))
    stream = generator.stream(options.num_images, options.batch_size, class_labels=labels, **arguments)
    with closing(stream), progress_bar(options.num_images, "{task.completed}/{task.total}") as update:

        def counted() -> Iterator[Samples]:
            for samples in stream:
                yield samples
                update(advance=len(samples))

        yield counted()


def _concatenate(batches: Sequence[Samples]) -> Samples:
    """All samples as one batch, with the first batch's timings and the class labels of all."""
    if len(batches) == 1:
        return batches[0]
    array = np.concatenate([samples.array for samples in batches])
    conditioning = {name: np.concatenate([samples.conditioning[name] for samples in batches]) for name in batches[0].conditioning}
    return replace(batches[0], array=array, seeds=tuple(seed for samples in batches for seed in samples.seeds), conditioning=conditioning)


def describe(written: Written) -> str:
    """Return a line that says what was written."""
    seeds, count = written.seeds, len(written.seeds)
    first, last = seeds[0], seeds[-1]
    listed = f"{first}…{last}" if seeds == tuple(range(first, last + 1)) else listed_seeds(seeds)
    how = f"{written.evaluations} {'steps' if written.sampler is None else f'evaluations by {written.sampler}'}"
    samples = f"1 sample, seed {first}" if count == 1 else f"{count} samples, seeds {listed}"
    return f"wrote {written.out} ({samples}, {how}, {_duration(written.seconds)})"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def parse_labels(text: str, names: tuple[str, ...]) -> int | str | list[int | str]:
    """Parse the value of ``--labels``: label names of the bundle (which may be digits), or class indices. A single label applies to every sample."""

    def parse(part: str) -> int | str:
        try:
            return part if part in names else int(part)
        except ValueError:
            return part

    labels = [parse(text.strip())] if text.strip() in names else [parse(part.strip()) for part in text.split(",")]
    return labels[0] if len(labels) == 1 else labels
