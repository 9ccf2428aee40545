"""A simulation in NumPy of those parts of cuda-core and cuda-bindings that ``scm_runtime.engines.cuda`` uses.

It is lazier and stricter than a device. A stream runs nothing until something waits for it, which reveals missing synchronization, and host memory that is
changed or read too early. New memory holds NaN. Addresses outside live allocations, calls from a second thread, and calls that would invalidate a capture
are errors.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scm_runtime.engines.cuda.capture_lock import CAPTURE_LOCK

DEVICE_MEMORY = 0x7F00_0000_0000_0000  # above all host addresses of the process
LEGACY = 1


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2


class Misuse(BaseException):
    """An error in the use of CUDA, which a device may not even report. A BaseException, so that no handler in the code under test swallows it."""


def expect(condition: object, message: str) -> None:
    """Raise Misuse unless the condition holds."""
    if not condition:
        raise Misuse(message)


class CudaError(Exception):
    """An error as cuda-core raises it."""


@dataclass(eq=False)
class Allocation:
    address: int
    data: NDArray[np.uint8]
    freed: bool = False
    """Whether a free is enqueued: later work must not use the memory."""
    reclaimed: bool = False
    """Whether the stream has executed the free."""


@dataclass(eq=False)
class Event:
    driver: FakeDriver
    stream: Stream
    timed: bool
    at: int
    done: bool = False

    @property
    def handle(self) -> Event:
        return self

    def sync(self) -> None:
        self.driver.check_call()
        self.stream.execute_to(self)

    def __sub__(self, other: Event) -> float:
        expect(self.timed, "the later event records no time")
        expect(other.timed, "the earlier event records no time")
        expect(self.done, "the later event is not done")
        expect(other.done, "the earlier event is not done")
        return float(self.at - other.at)


@dataclass(eq=False)
class Stream:
    driver: FakeDriver
    index: int
    handle: int
    queue: list[Callable[[], None] | Event] = field(default_factory=list)
    capturing: bool = False
    closed: bool = False

    @property
    def device(self) -> Any:
        return SimpleNamespace(device_id=self.index)

    def put(self, work: Callable[[], None] | Event) -> None:
        expect(not self.closed, "work on a closed stream")
        if self.capturing:
            raise CudaError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: operation failed due to a previous error during capture")
        self.queue.append(work)

    def record(self, options: Any = None) -> Event:
        self.driver.check_call()
        event = Event(self.driver, self, bool(options and options.timing_enabled), self.driver.tick())
        self.put(event)
        return event

    def wait(self, event: Event) -> None:
        self.driver.check_call(any_thread=not self.driver.open)
        self.put(lambda: event.stream.execute_to(event))
        self.driver.waits.append((self.handle, event))

    def execute_to(self, event: Event) -> None:
        while not event.done:
            expect(self.queue, "waiting for an event that was never recorded")
            work = self.queue.pop(0)
            if isinstance(work, Event):
                work.done = True
            else:
                work()

    def close(self) -> None:
        self.driver.check_call()
        self.closed = True


class Buffer:
    """A buffer of cuda-core. Collecting one that was not closed is recorded as a leak."""

    def __init__(self, driver: FakeDriver, allocation: Allocation, stream: Stream, size: int) -> None:
        self._driver, self._allocation, self._stream, self.size = driver, allocation, stream, size
        self.handle = allocation.address

    def close(self, stream: Stream | None = None) -> None:
        if self._allocation.freed:
            return
        self._allocation.freed = True
        self._driver.check_call(any_thread=not self._driver.open)
        stream, allocation = stream or self._stream, self._allocation

        def free() -> None:
            allocation.reclaimed = True

        if stream.closed:
            free()
        else:
            stream.put(free)
        self._driver.frees.append((allocation.address, stream.handle))

    def __del__(self) -> None:
        if not self._allocation.freed:
            self._allocation.freed = True
            self._driver.leaked.append(self._allocation.address)


class Pinned:
    """A buffer of pinned host memory."""

    def __init__(self, driver: FakeDriver, size: int) -> None:
        self.data = np.full(size, 0xEE, np.uint8)
        self.handle, self.size, self.driver = self.data.ctypes.data, size, driver
        driver.pinned[self.handle] = self

    def close(self) -> None:
        self.driver.check_call()
        del self.driver.pinned[self.handle]


@dataclass(eq=False)
class Capsule:
    """A DLPack capsule."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    versioned: bool
    keeps: Any


class FakeDriver:
    """Simulated CUDA devices, and a record of what happened on them."""

    def __init__(self, capacity: int = 1 << 30) -> None:
        self.capacity = capacity
        self.allocations: dict[int, Allocation] = {}
        self.next_address = DEVICE_MEMORY
        self.streams: dict[int, Stream] = {}
        self.legacy = self.make_stream(0, LEGACY)
        self.pinned: dict[int, Pinned] = {}
        self.threads: set[int] = set()
        self.allow_other_threads = False
        self.open = True
        self.ticks = 0
        self.waits: list[tuple[int, Event]] = []
        self.frees: list[tuple[int, int]] = []
        self.leaked: list[int] = []
        self.to_host: list[int] = []
        self.device_syncs = 0

    def make_stream(self, index: int = 0, handle: int | None = None) -> Stream:
        stream = Stream(self, index, 0xC0DE00 + 16 * len(self.streams) if handle is None else handle)
        self.streams[stream.handle] = stream
        return stream

    def tick(self) -> int:
        self.ticks += 1
        return self.ticks

    def check_call(self, *, any_thread: bool = False) -> None:
        """Raise Misuse if CUDA must not be called now in this thread."""
        if not any_thread and not self.allow_other_threads:
            self.threads.add(threading.get_ident())
            expect(len(self.threads) == 1, "CUDA was called from a second thread")
        expect(not CAPTURE_LOCK._capturing or self.inside_run, "CUDA was called while a graph was captured")

    inside_run = False

    @property
    def used(self) -> int:
        return sum(len(one.data) for one in self.allocations.values() if not one.freed)

    def allocate(self, size: int, stream: Stream) -> Buffer:
        self.check_call()
        if self.used + size > self.capacity:
            raise CudaError("CUDA_ERROR_OUT_OF_MEMORY: The API call failed because it was unable to allocate enough memory")
        allocation = Allocation(self.next_address, np.full(size, 0xFF, np.uint8))
        self.next_address += size + 4096 & ~0xFF
        self.allocations[allocation.address] = allocation
        return Buffer(self, allocation, stream, size)

    def bytes_at(self, address: int, nbytes: int, *, queueing: bool) -> NDArray[np.uint8]:
        """Return the bytes at a device address, for work that is being enqueued or executed."""
        for one in self.allocations.values():
            if one.address <= address and address + nbytes <= one.address + len(one.data):
                expect(not (one.freed if queueing else one.reclaimed), "memory was used after it was freed")
                return one.data[address - one.address : address - one.address + nbytes]
        raise Misuse(f"{nbytes} bytes at {address:#x} are not in an allocation of the device")

    def copy(self, to: int, source: int, nbytes: int, stream: Stream) -> tuple[Status]:
        self.check_call()
        before: bytes | None = None
        if source >= DEVICE_MEMORY:
            self.bytes_at(source, nbytes, queueing=True)
        else:
            before = ctypes.string_at(source, nbytes)
        if to >= DEVICE_MEMORY:
            self.bytes_at(to, nbytes, queueing=True)
        else:
            expect(any(at <= to and to + nbytes <= at + pinned.size for at, pinned in self.pinned.items()), "the host memory of a copy is not pinned")
            self.to_host.append(nbytes)

        def work() -> None:
            if source >= DEVICE_MEMORY:
                data = self.bytes_at(source, nbytes, queueing=False).tobytes()
            else:
                data = ctypes.string_at(source, nbytes)
                expect(data == before, "the host changed or dropped memory before the copy was done")
            if to >= DEVICE_MEMORY:
                self.bytes_at(to, nbytes, queueing=False)[:] = np.frombuffer(data, np.uint8)
            else:
                ctypes.memmove(to, data, nbytes)

        stream.put(work)
        return (Status.CUDA_SUCCESS,)

    def modules(self) -> tuple[Any, Any, Any]:
        """Return stand-ins for cuda.core, cuda.core.utils and cuda.bindings.driver."""
        machine = self
        ok = Status.CUDA_SUCCESS

        class Device:
            properties = SimpleNamespace(memory_pools_supported=True)

            def __init__(self, index: int) -> None:
                self.device_id = index
                self.memory_resource = object()

            def set_current(self) -> None:
                machine.check_call()

            def create_stream(self) -> Stream:
                machine.check_call()
                return machine.make_stream(self.device_id)

            def sync(self) -> None:
                machine.device_syncs += 1

        class Pool:
            handle = "pool"

            def __init__(self, device: Device, options: Any) -> None:
                machine.check_call()

            def allocate(self, size: int, *, stream: Stream) -> Buffer:
                return machine.allocate(size, stream)

            def close(self) -> None:
                machine.open = False

        class Streams:
            @staticmethod
            def from_handle(handle: int) -> Stream:
                if handle not in machine.streams:
                    raise CudaError("CUDA_ERROR_INVALID_HANDLE: no such stream")
                return machine.streams[handle]

        class Foreign:
            """A buffer over memory that another object owns."""

            @staticmethod
            def from_handle(address: int, size: int, *, owner: Any) -> Any:
                expect(machine.pushed, "memory is accessed without a current context")
                return SimpleNamespace(handle=address, size=size, owner=owner)

        class View:
            @staticmethod
            def from_buffer(buffer: Any, shape: tuple[int, ...], *, dtype: np.dtype[Any]) -> Any:
                def dlpack(*, max_version: tuple[int, int] | None = None) -> Capsule:
                    return Capsule(buffer.handle, shape, dtype, max_version is not None and max_version >= (1, 0), buffer)

                return SimpleNamespace(__dlpack__=dlpack)

        class PinnedResource:
            def allocate(self, size: int) -> Pinned:
                machine.check_call()
                return Pinned(machine, size)

        def end_capture(handle: int) -> tuple[Status, int]:
            machine.streams[handle].capturing = False
            return ok, 0

        def wait_event(stream: int, event: Event, flags: int) -> tuple[Status]:
            expect(machine.pushed, "a default stream is used without a current context")
            machine.streams[stream].put(lambda: event.stream.execute_to(event))
            machine.waits.append((stream, event))
            return (ok,)

        def push(context: Any) -> tuple[Status]:
            machine.pushed.append(context)
            return (ok,)

        core = SimpleNamespace(
            Device=Device,
            Stream=Streams,
            EventOptions=lambda timing_enabled: SimpleNamespace(timing_enabled=timing_enabled),
            LEGACY_DEFAULT_STREAM=self.legacy,
            DeviceMemoryResource=Pool,
            DeviceMemoryResourceOptions=lambda: None,
            LegacyPinnedMemoryResource=PinnedResource,
            Buffer=Foreign,
        )
        driver = SimpleNamespace(
            CUmemPool_attribute=SimpleNamespace(CU_MEMPOOL_ATTR_RELEASE_THRESHOLD=1),
            CUstreamCaptureStatus=SimpleNamespace(CU_STREAM_CAPTURE_STATUS_NONE=0),
            cuuint64_t=int,
            cuCtxGetCurrent=lambda: (ok, "context"),
            cuCtxPushCurrent=push,
            cuCtxPopCurrent=lambda: (ok, machine.pushed.pop()),
            cuMemPoolSetAttribute=lambda pool, attribute, value: (ok,),
            cuMemPoolTrimTo=lambda pool, keep: (ok,),
            cuMemcpyAsync=lambda to, source, nbytes, handle: machine.copy(to, source, nbytes, machine.streams[handle]),
            cuStreamIsCapturing=lambda handle: (ok, int(machine.streams[handle].capturing)),
            cuStreamEndCapture=end_capture,
            cuGraphDestroy=lambda graph: (ok,),
            cuStreamWaitEvent=wait_event,
        )
        return core, SimpleNamespace(StridedMemoryView=View), driver

    pushed: list[Any] = []  # noqa: RUF012 - CUDA has a stack per thread; tests use one thread at a time
