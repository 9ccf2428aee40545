"""One bundle on several devices: a Generator each, and every call goes to the one with the least to do."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, Unpack

from scm_runtime.errors import InvalidArgumentError
from scm_runtime.generator import Generator
from scm_runtime.inputs.arguments import CallArguments
from scm_runtime.inputs.call import Labels
from scm_runtime.samples import Samples
from scm_runtime.sampling.streaming import Queued

if TYPE_CHECKING:
    from concurrent.futures import Future


class DevicePool(Queued):
    """Draws samples on several devices: ``DevicePool(bundle, devices=("cuda:0", "cuda:1"))``. Any number of threads may use it."""

    def __init__(self, bundle: str | os.PathLike[str], devices: Sequence[str] = ("cuda:0", "cuda:1"), **options: Any) -> None:
        """Open the bundle on each device.

        Args:
            bundle: as of a Generator.
            devices: one or more; a device that stands there twice gets two Generators.
            **options: the other arguments of a Generator, for all of them.

        Raises:
            InvalidArgumentError: no devices, or what a Generator raises. If one device cannot be had, none is kept.
        """
        if isinstance(devices, str) or not devices:
            raise InvalidArgumentError(f"devices must be one device or more, such as ('cuda:0', 'cuda:1'), got {devices!r}")
        opened: list[Generator] = []
        try:
            for device in devices:
                opened.append(Generator(bundle, device=device, **options))  # noqa: PERF401 - those before one that fails are to be closed
        except BaseException:
            for generator in opened:
                generator.close()
            raise
        self.generators: tuple[Generator, ...] = tuple(opened)
        """For what is a matter of one device: ``info``, ``encode``, ``decode``."""
        self._lock = threading.RLock()  # re-entered where the garbage collector ends a stream
        self._busy = [0] * len(opened)
        self._turns = [0] * len(opened)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(wait=kind is None)

    def __repr__(self) -> str:
        return f"DevicePool({os.fspath(self.generators[0].folder)!r}, devices={tuple(generator.info.device for generator in self.generators)})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a DevicePool holds open sessions and cannot be pickled: make one in each process")

    def __call__(self, class_labels: Labels | None = None, **arguments: Unpack[CallArguments]) -> Samples:
        """A call of the Generator with the least to do."""
        with self._least_busy() as generator:
            return generator(class_labels, **arguments)

    def submit(self, class_labels: Labels | None = None, **arguments: Unpack[CallArguments]) -> Future[Samples]:
        """``submit`` of the Generator with the least to do."""
        i = self._take()
        try:
            future = self.generators[i].submit(class_labels, **arguments)
        except BaseException:
            self._give(i)
            raise
        future.add_done_callback(lambda _: self._give(i))
        return future

    def warmup(self, batch_sizes: Sequence[int] = (1,), **arguments: Any) -> None:
        """``warmup`` of each Generator."""
        for generator in self.generators:
            generator.warmup(batch_sizes, **arguments)

    def close(self, *, wait: bool = False) -> None:
        """Close each Generator."""
        if not wait:
            for generator in self.generators:  # all of them, before any is waited for
                generator._terminate()
        for generator in self.generators:
            generator.close(wait=wait)

    def _streaming(self) -> tuple[Generator, int, int]:
        generator, largest, ahead = self.generators[0]._streaming()
        return generator, largest, ahead * len(self.generators)

    @contextmanager
    def _least_busy(self) -> Iterator[Generator]:
        i = self._take()
        try:
            yield self.generators[i]
        finally:
            self._give(i)

    def _take(self) -> int:
        """Index of the Generator that has the fewest calls; of several such, the one that had the fewest turns."""
        self.generators[0]._check_process()  # before the lock: a thread that a forked child has not may hold it
        with self._lock:
            i = min(range(len(self._busy)), key=lambda i: (self.generators[i].closed, self._busy[i], self._turns[i]))
            self._busy[i] += 1
            self._turns[i] += 1
            return i

    def _give(self, i: int) -> None:
        with self._lock:
            self._busy[i] -= 1
