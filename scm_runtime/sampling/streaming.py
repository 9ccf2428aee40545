"""``async_`` and ``stream``, which Generator and DevicePool have in common: both use ``submit``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Generator as Iteration
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Unpack, cast

from scm_runtime.bundle.manifest import Manifest
from scm_runtime.common.checks import is_int
from scm_runtime.common.runs import CancelScope, interrupted_error
from scm_runtime.errors import GenerationTimeoutError, InvalidArgumentError, QueueFullError
from scm_runtime.inputs.arguments import CONDITIONING, BatchArguments, CallArguments, Labels, Seeds, check_names, gather_conditioning
from scm_runtime.inputs.call import check_range, random_seed, read_latents, read_seeds
from scm_runtime.inputs.conditioning import BatchedInput, read_input
from scm_runtime.inputs.prompts import read_prompts
from scm_runtime.inputs.signatures import lists_arguments
from scm_runtime.samples import Samples
from scm_runtime.sampling.deadline import Deadline, read_deadline

if TYPE_CHECKING:
    from concurrent.futures import Future


PROMPTS = ("prompt", "negative_prompt")


class StreamSource(NamedTuple):
    """What a stream needs to know of the Generator that it checks its arguments against."""

    manifest: Manifest
    check_arguments: Callable[[CallArguments], object]
    """Raises InvalidArgumentError as a call with these arguments does."""
    check_process: Callable[[], None]
    """Raises ForkedError in a forked child, where no thread computes the samples."""
    batch_size: int
    """Default batch size."""
    prefetch: int
    """Number of batches to compute ahead."""


class QueuedSampling:
    """Methods built on ``submit``."""

    @lists_arguments(CallArguments)
    def submit(self, class_labels: Labels | None = None, **arguments: Unpack[CallArguments]) -> Future[Samples]:
        """Queue a call, and return the future of its samples."""
        raise NotImplementedError

    @lists_arguments(CallArguments)
    async def async_(self, class_labels: Labels | None = None, **arguments: Unpack[CallArguments]) -> Samples:
        """Await the samples of ``submit``: ``await generate.async_([3, 1, 4], seed=7)``. Cancelling the task cancels the request, within its step.

        Prompts are encoded in a thread of asyncio's pool, so that the event loop goes on.
        """
        import asyncio

        if any(arguments.get(name) is not None for name in PROMPTS):
            scope = CancelScope()
            try:
                arguments = await asyncio.to_thread(scope.call, partial(self._encode_prompts, arguments))
            except asyncio.CancelledError:
                scope.cancel(interrupted_error)
                raise
        future = self.submit(class_labels, **arguments)
        try:
            return await asyncio.wrap_future(future)
        finally:
            future.cancel()  # without effect on a future that is done

    @lists_arguments(BatchArguments)
    def stream(
        self,
        num_images: int,
        batch_size: int | None = None,
        *,
        class_labels: Labels | None = None,
        seed: Seeds | None = None,
        **arguments: Unpack[BatchArguments],
    ) -> Iteration[Samples]:
        """Generate many samples in batches, in order, and compute the next batch ahead: ``for samples in generate.stream(50_000, seed=0): …``

        Args:
            num_images: total number of samples.
            batch_size: samples per batch; the last batch may be smaller. ``max_batch_size`` by default.
            class_labels: one label for all samples, or one for each of ``num_images``. The same holds for prompts, the other conditioning and ``latents``.
            seed: seed of the first sample; the others get seed + 1, …, independent of the batch size. Or a list with one seed per sample. None: random.
            **arguments: the other arguments of a call. ``timeout`` is the time limit of the whole stream, from this call on.

        Returns:
            An iterator over batches. Nothing is computed before the first batch is requested. Closing the iterator cancels the batches that are computed
            ahead, within their step; an error ends it.

        Raises:
            InvalidArgumentError, GeneratorClosedError, ForkedError: immediately, as in a call.
            QueueFullError: from the iterator, if ``max_queue`` requests are not finished.
        """
        source = self._stream_source()
        size = source.batch_size if batch_size is None else batch_size
        check_names(arguments, BatchArguments)
        for name, value in (("num_images", num_images), ("batch_size", size)):
            if not is_int(value) or value < 1:
                raise InvalidArgumentError(f"{name} must be an integer of at least 1, got {value!r}")
        deadline = read_deadline(arguments.get("timeout"))
        slices = _slices(source.manifest, num_images, class_labels, seed, arguments)

        def batch(start: int) -> CallArguments:
            call = slices(start, min(start + size, num_images))
            return call if deadline is None else {**call, "timeout": deadline.remaining()}

        source.check_arguments(batch(0))  # raise errors now, not when the first batch is requested
        batches = _batches(lambda start: self.submit(**batch(start)), source.check_process, iter(range(0, num_images, size)), source.prefetch)
        return batches if deadline is None else _limited(batches, deadline)

    def _encode_prompts(self, arguments: CallArguments) -> CallArguments:
        """Return the arguments of a call with conditioning in place of its prompts, and its deadline in place of its timeout."""
        raise NotImplementedError

    def _stream_source(self) -> StreamSource:
        """Return what a stream needs. Raises GeneratorClosedError and ForkedError."""
        raise NotImplementedError


def _batches(submit: Callable[[int], Future[Samples]], check: Callable[[], None], starts: Iterator[int], prefetch: int) -> Iteration[Samples]:
    pending: deque[Future[Samples]] = deque()
    start = next(starts, None)
    try:
        while True:
            while len(pending) <= prefetch and start is not None:
                try:
                    pending.append(submit(start))
                except QueueFullError:
                    if not pending:
                        raise
                    break  # others fill the queue: go on with fewer batches ahead
                start = next(starts, None)
            if not pending:
                return
            if not pending[0].done():
                check()  # in a forked child no thread computes it
            pending[0].exception()  # waits while the future is still in pending, so that Ctrl-C cancels it
            yield pending.popleft().result()  # no variable keeps the samples alive
    finally:
        for future in pending:
            future.cancel()


def _limited(batches: Iteration[Samples], deadline: Deadline) -> Iteration[Samples]:
    """Iterate over batches whose timeouts are what remains of the stream's, and name that of the stream in the error."""
    try:
        yield from batches
    except GenerationTimeoutError as error:
        raise deadline.error() from error


def _slices(
    manifest: Manifest, num_images: int, class_labels: Labels | None, seed: Seeds | None, arguments: BatchArguments
) -> Callable[[int, int], CallArguments]:
    """Check the arguments that are given per sample, and return a function that makes the call arguments of samples ``start`` to ``stop``."""
    inputs = {item.name: item for item in manifest.conditioning}
    given = gather_conditioning(manifest, class_labels, arguments)
    columns = {name: read_input(inputs[name], value) if name in inputs else BatchedInput(value, broadcast=True) for name, value in given.items()}
    latents = arguments.get("latents")
    start_from = None if latents is None else read_latents(latents, manifest.sample.shape)
    lengths = {name: column.length for name, column in columns.items() if column.length is not None}
    lengths |= {} if start_from is None else {"latents": len(start_from)}
    prompts = {name: read_prompts(name, value) for name in PROMPTS if (value := arguments.get(name)) is not None}
    lengths |= {name: len(value) for name, value in prompts.items() if isinstance(value, list)}
    seeds: range | list[int]
    if seed is None or is_int(seed):
        first = random_seed() if seed is None else int(cast(int, seed))
        seeds = range(first, first + num_images)
    else:
        seeds = read_seeds(seed)
        lengths["seed"] = len(seeds)
    for name, length in lengths.items():
        if length != num_images:
            raise InvalidArgumentError(f"{name} must be one for all samples, or one for each of the {num_images}, got {length}")
    check_range(seeds)
    others = {name: value for name, value in arguments.items() if name not in (*CONDITIONING, *PROMPTS, "conditioning", "latents")}

    def between(start: int, stop: int) -> CallArguments:
        conditioning = {name: column.values if column.broadcast else column.values[start:stop] for name, column in columns.items()}
        texts = {name: value if isinstance(value, str) else value[start:stop] for name, value in prompts.items()}
        batch = {**others, **texts, "conditioning": conditioning, "seed": list(seeds[start:stop])}
        if start_from is not None:
            batch["latents"] = start_from[start:stop]
        return cast(CallArguments, batch)

    return between
