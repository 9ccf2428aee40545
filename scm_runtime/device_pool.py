"""``DevicePool``: one bundle on several devices, with a Generator on each. Every call goes to the least busy one."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, Unpack

from numpy.typing import NDArray

from scm_runtime.devices.placement import all_devices
from scm_runtime.errors import InvalidArgumentError
from scm_runtime.generator import Generator
from scm_runtime.inputs.arguments import CallArguments, Labels
from scm_runtime.inputs.prompts import Prompts
from scm_runtime.inputs.signatures import list_keywords, lists_arguments
from scm_runtime.samples import Samples
from scm_runtime.sampling.streaming import QueuedSampling, StreamSource

if TYPE_CHECKING:
    from concurrent.futures import Future


class DevicePool(QueuedSampling):
    """Generates samples on several devices: ``DevicePool(bundle, devices=("cuda:0", "cuda:1"))``. Any number of threads may use it."""

    def __init__(self, bundle: str | os.PathLike[str], devices: Sequence[str] | None = None, **options: Any) -> None:
        """Open the bundle on each device.

        Args:
            bundle: as for a Generator.
            devices: one or more devices, such as ``("cuda:0", "cuda:1")``; None for all GPUs, or the CPU if no GPU can be used.
                A device that is listed twice gets two Generators.
            **options: the other arguments of the Generators.

        Raises:
            InvalidArgumentError: there are no devices.
            ScmError: what a Generator raises. If one device is not available, all Generators are closed.
        """
        if devices is None:
            devices = all_devices()
        if isinstance(devices, str) or not devices:
            raise InvalidArgumentError(f"devices must be one device or more, such as ('cuda:0', 'cuda:1'), got {devices!r}")
        opened: list[Generator] = []
        try:
            for device in devices:
                opened.append(Generator(bundle, device=device, **options))  # noqa: PERF401 - if one fails, those before it are closed
        except BaseException:
            for generator in opened:
                generator.close()
            raise
        self.generators: tuple[Generator, ...] = tuple(opened)
        """The Generators, one per device, with ``info``, ``encode`` and ``decode``."""
        self._lock = threading.RLock()  # the garbage collector may enter it again when it closes a stream
        self._running = [0] * len(opened)
        self._calls = [0] * len(opened)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(wait=kind is None)

    def __repr__(self) -> str:
        return f"DevicePool({os.fspath(self.generators[0].folder)!r}, devices={tuple(generator.info.device for generator in self.generators)})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a DevicePool holds open sessions and cannot be pickled: make one in each process")

    @lists_arguments(CallArguments)
    def __call__(self, class_labels: Labels | None = None, **arguments: Unpack[CallArguments]) -> Samples:
        """Call the least busy Generator, with the arguments of its call."""
        with self._least_busy() as generator:
            return generator(class_labels, **arguments)

    @lists_arguments(CallArguments)
    def submit(self, class_labels: Labels | None = None, **arguments: Unpack[CallArguments]) -> Future[Samples]:
        """Submit to the least busy Generator, with the arguments of its ``submit``."""
        i = self._acquire()
        try:
            future = self.generators[i].submit(class_labels, **arguments)
        except BaseException:
            self._release(i)
            raise
        future.add_done_callback(lambda _: self._release(i))
        return future

    def encode_prompt(self, prompts: Prompts, negative_prompt: Prompts | None = None, strict: bool = False) -> dict[str, NDArray[Any]]:
        """Encode prompts on the least busy device, as ``Generator.encode_prompt``."""
        with self._least_busy() as generator:
            return generator.encode_prompt(prompts, negative_prompt, strict)

    def _encode_prompts(self, arguments: CallArguments) -> CallArguments:
        with self._least_busy() as generator:
            return generator._encode_prompts(arguments)

    def warmup(self, batch_sizes: Sequence[int] = (1,), **arguments: Any) -> tuple[int, ...]:
        """Warm up each Generator; the arguments are those of ``Generator.warmup``. Returns the batch sizes that are captured on all devices."""
        captured = [set(generator.warmup(batch_sizes, **arguments)) for generator in self.generators]
        return tuple(sorted(set.intersection(*captured)))

    def close(self, *, wait: bool = False) -> None:
        """Close each Generator; ``wait`` is that of ``Generator.close``."""
        if not wait:
            for generator in self.generators:  # terminate all before waiting for one
                generator._terminate()
        for generator in self.generators:
            generator.close(wait=wait)

    def _stream_source(self) -> StreamSource:
        source = self.generators[0]._stream_source()
        return source._replace(prefetch=source.prefetch * len(self.generators))

    @contextmanager
    def _least_busy(self) -> Iterator[Generator]:
        i = self._acquire()
        try:
            yield self.generators[i]
        finally:
            self._release(i)

    def _acquire(self) -> int:
        """Count a call for the open Generator with the fewest running calls, and of those the one with the fewest calls so far. Return its index."""
        self.generators[0]._check_process()  # before taking the lock, which a thread that a forked child lacks may hold
        with self._lock:
            i = min(range(len(self._running)), key=lambda i: (self.generators[i].closed, self._running[i], self._calls[i]))
            self._running[i] += 1
            self._calls[i] += 1
            return i

    def _release(self, i: int) -> None:
        with self._lock:
            self._running[i] -= 1


list_keywords(DevicePool.__init__, [option for option in inspect.signature(Generator).parameters.values() if option.name != "device"])
list_keywords(DevicePool.warmup, inspect.signature(Generator.warmup).parameters.values())
