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
from numpy.typing import NDArray

from scm_runtime.cli.metadata import ImageMetadata
from scm_runtime.cli.prompts import as_unicode
from scm_runtime.errors import InvalidArgumentError
from scm_runtime.samples import EXPORT_A_DECODER, Samples, image_format_of, listed_seeds

if TYPE_CHECKING:
    from scm_runtime.cli.output_files import OutputPattern
    from scm_runtime.generator import Generator


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during sampling. The message says how many images were written."""


@dataclass(frozen=True)
class GenerateOptions:
    """Arguments of a Generator's call, from the command line; None for those that were not given."""

    prompts: str | list[str] | None
    """One prompt for all images, or several with ``num_images`` images each, by default one."""
    negative_prompt: str | None
    strict_prompt: bool

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

    @property
    def total(self) -> int | None:
        """Number of images that are generated in batches; None for one batch."""
        if isinstance(self.prompts, list):
            return len(self.prompts) * (self.num_images or 1)
        return self.num_images

    def prompts_of(self, images: range) -> list[str]:
        """Return the prompts of images by their indices; an empty list if there are no prompts."""
        if isinstance(self.prompts, list):
            return [self.prompts[i // (self.num_images or 1)] for i in images]
        return [] if self.prompts is None else [self.prompts] * len(images)


class Written(Struct, frozen=True):
    """What ``scm-runtime generate`` wrote; the JSON document of ``--json``."""

    out: str
    """The value of ``-o``."""
    files: tuple[str, ...]
    """Paths of the image files: one of all samples, or one for each sample."""
    seeds: tuple[int, ...]
    class_labels: tuple[int, ...] | None
    """Class of each sample; None if the bundle has no classes."""
    prompts: tuple[str, ...] | None
    """Prompt of each sample; None if there are none."""
    evaluations: int
    """Evaluations of the network per sample."""
    sampler: str | None
    """None for the bundle's default."""
    seconds: float
    """Time of the batch, or of all batches and files with ``--num-images``."""

    def to_json(self) -> bytes:
        """Encode as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)


def generate_images(generator: Generator, options: GenerateOptions, output: OutputPattern, columns: int | None, *, metadata: bool = True) -> Written:
    """Sample, write the image files, and return what was written.

    Without ``num_images`` this is one batch, as in a call of the Generator. With it, samples are generated in batches: a single seed is the first of
    consecutive ones over all batches, and labels are repeated until there are enough. Several prompts are generated in batches too, ``num_images`` of each.
    With ``metadata``, PNG files have the texts of ``metadata.py``.

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
    texts = ImageMetadata(generator, options) if metadata and image_format_of(output.path(0, 0)) == "PNG" else None
    start = time.perf_counter()
    files: list[str] = []
    batches: list[Samples] = []
    try:
        with _batches(generator, options) as sampled:
            for samples in (replace(one, conditioning=_labels_of(one, generator)) for one in sampled):  # embeddings are large
                if not output.file_per_sample:
                    batches.append(samples)
                    continue
                for i, seed in enumerate(samples.seeds):
                    written = None if texts is None else texts.of([seed], options.prompts_of(range(len(files), len(files) + 1)))
                    path = replace(samples, array=samples.array[i : i + 1], seeds=(seed,)).save(output.path(len(files), seed), metadata=written)
                    files.append(str(path))
                batches.append(replace(samples, array=samples.array[:0].copy()))  # a copy: a view would keep all pixels in memory
        merged = _concatenate(batches)
        listed = options.prompts_of(range(len(merged.seeds)))
        if not output.file_per_sample:
            written = None if texts is None else texts.of(merged.seeds, listed)
            files.append(str(merged.save(output.path(0, 0), columns=columns, metadata=written)))
    except KeyboardInterrupt as error:
        raise Interrupted(f"{len(files)} of {options.total or 'the'} images are in '{output.shown}'" if files else "nothing was written") from error
    seconds = time.perf_counter() - start if options.total else merged.timings.total
    labels = next(iter(merged.conditioning.values()), None)
    return Written(
        out=as_unicode(output.shown),
        files=tuple(map(as_unicode, files)),
        seeds=merged.seeds,
        class_labels=None if labels is None else tuple(labels.tolist()),
        prompts=tuple(listed) or None,
        evaluations=len(merged.timings.steps),
        sampler=options.sampler,
        seconds=seconds,
    )


@contextmanager
def _batches(generator: Generator, options: GenerateOptions) -> Iterator[Iterator[Samples]]:
    """Yield an iterator over batches of samples, and show a progress bar on a terminal if there may be several batches."""
    arguments: dict[str, Any] = {
        "seed": options.seed[0] if options.seed is not None and len(options.seed) == 1 else options.seed,
        "num_inference_steps": options.steps,
        "timesteps": options.timesteps,
        "sampler": options.sampler,
        "guidance_scale": options.guidance_scale,
        "prompt": options.prompts_of(range(options.total or 0)) if isinstance(options.prompts, list) else options.prompts,
        "negative_prompt": options.negative_prompt,
        "strict_prompt": options.strict_prompt,
        "conditioning": options.conditioning,
        "timeout": options.timeout,
        "output_type": "np",
    }
    total = options.total
    if total is None:
        # Not a direct call: Ctrl-C interrupts the wait for a future immediately, but not a step that this thread runs itself.
        yield iter([generator.submit(options.labels, batch_size=options.batch_size, **arguments).result()])
        return
    from scm_runtime.cli.tables import progress_bar  # rich takes a while to import

    labels = options.labels
    if isinstance(labels, list) and len(labels) < total:
        labels = list(islice(cycle(labels), total))
    stream = generator.stream(total, options.batch_size, class_labels=labels, **arguments)
    with closing(stream), progress_bar(total, "{task.completed}/{task.total}") as update:

        def counted() -> Iterator[Samples]:
            for samples in stream:
                yield samples
                update(advance=len(samples))

        yield counted()


def _labels_of(samples: Samples, generator: Generator) -> dict[str, NDArray[Any]]:
    """Return the class labels of samples by the name of their input, or nothing if the bundle has none."""
    labels = generator.manifest.labels
    return {} if labels is None or labels.name not in samples.conditioning else {labels.name: samples.conditioning[labels.name]}


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
