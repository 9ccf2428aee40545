"""Awaiting a request, and ``stream``: many samples in batches, in order, of which few are computed ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Generator as Iteration
from typing import TYPE_CHECKING, Any, Unpack, cast

from scm_runtime.common.checks import is_int
from scm_runtime.errors import InvalidArgumentError
from scm_runtime.inputs.arguments import CONDITIONING, BatchArguments, CallArguments, check_names, conditioning_of
from scm_runtime.inputs.call import Labels, Seeds, check_range, random_seed, read_latents, read_seeds
from scm_runtime.inputs.conditioning import BatchedInput, read_input
from scm_runtime.samples import Samples
from scm_runtime.sampling.request import read_request

if TYPE_CHECKING:
    from concurrent.futures import Future

    from scm_runtime.generator import Generator


class Queued:
    """What follows from ``submit``: to await it, and streams."""

    def submit(self, class_labels: Labels | None = None, **arguments: Unpack[CallArguments]) -> Future[Samples]:
        """A call's future samples."""
        raise NotImplementedError

    async def async_(self, class_labels: Labels | None = None, **arguments: Unpack[CallArguments]) -> Samples:
        """``submit``, awaited: ``await generate.async_([3, 1, 4], seed=7)``. Cancelling the task cancels the request."""
        import asyncio

        return await asyncio.wrap_future(self.submit(class_labels, **arguments))

    def stream(
        self,
        num_images: int,
        batch_size: int | None = None,
        *,
        class_labels: Labels | None = None,
        seed: Seeds | None = None,
        **arguments: Unpack[BatchArguments],
    ) -> Iteration[Samples]:
        """Draw many samples, batch by batch and in order, while the next batch is computed ahead: ``for samples in generate.stream(50_000, seed=0): …``

        Args:
            num_images: in all.
            batch_size: of each batch but the last, which may be smaller; ``max_batch_size`` by default.
            class_labels: for all samples, or one for each of ``num_images``; so with the other conditioning and ``latents``.
            seed: of the first sample, those after it get seed + 1, …, whatever the batches; or a list, one a sample. None: drawn at random.
            **arguments: the others of a call.

        Returns:
            An iterator. Nothing is computed before its first batch is asked for. Closing it cancels what is computed ahead; an error ends it.

        Raises:
            InvalidArgumentError, GeneratorClosedError, ForkedError: at once, as a call does.
        """
        generator, largest, ahead = self._streaming()
        size = largest if batch_size is None else batch_size
        check_names(arguments, BatchArguments)
        for name, value in (("num_images", num_images), ("batch_size", size)):
            if not is_int(value) or value < 1:
                raise InvalidArgumentError(f"{name} must be an integer of at least 1, got {value!r}")
        slices = _slices(generator, num_images, class_labels, seed, arguments)

        def batch(start: int) -> CallArguments:
            return slices(start, min(start + size, num_images))

        read_request(generator, None, batch(0))  # what is wrong shows now
        return _batches(lambda start: self.submit(**batch(start)), generator._check_process, iter(range(0, num_images, size)), ahead)

    def _streaming(self) -> tuple[Generator, int, int]:
        """Whose bundle arguments are checked against, the batch size by default, and how many batches are computed ahead."""
        raise NotImplementedError


def _batches(submit: Callable[[int], Future[Samples]], check: Callable[[], None], starts: Iterator[int], ahead: int) -> Iteration[Samples]:
    pending: deque[Future[Samples]] = deque()
    try:
        while True:
            while len(pending) <= ahead and (start := next(starts, None)) is not None:
                pending.append(submit(start))
            if not pending:
                return
            if not pending[0].done():
                check()  # in a forked child nobody works on it
            pending[0].exception()  # waits; an interrupt finds it among those to be cancelled
            yield pending.popleft().result()  # no name here keeps it alive
    finally:
        for future in pending:
            future.cancel()


def _slices(
    generator: Generator, num_images: int, class_labels: Labels | None, seed: Seeds | None, arguments: BatchArguments
) -> Callable[[int, int], CallArguments]:
    """What makes the arguments of samples start to stop; all that are for single samples are checked."""
    inputs = {item.name: item for item in generator.manifest.conditioning}
    given: dict[str, Any] = {name: value for name, value in conditioning_of(class_labels, arguments).items() if value is not None}
    columns = {name: read_input(inputs[name], value) if name in inputs else BatchedInput(value, broadcast=True) for name, value in given.items()}
    latents = arguments.get("latents")
    start_from = None if latents is None else read_latents(latents, generator.manifest.sample.shape)
    lengths = {name: column.length for name, column in columns.items() if column.length is not None}
    lengths |= {} if start_from is None else {"latents": len(start_from)}
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
    others = {name: value for name, value in arguments.items() if name not in (*CONDITIONING, "conditioning", "latents")}

    def between(start: int, stop: int) -> CallArguments:
        conditioning = {name: column.values if column.broadcast else column.values[start:stop] for name, column in columns.items()}
        batch = {**others, "conditioning": conditioning, "seed": list(seeds[start:stop])}
        if start_from is not None:
            batch["latents"] = start_from[start:stop]
        return cast(CallArguments, batch)

    return between
