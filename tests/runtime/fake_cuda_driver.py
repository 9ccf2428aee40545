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
    CUDA_ERROR_NOT_READY = 600


THREAD_LOCAL = 1  # capture mode
EXTERNAL = 1  # flag of cuEventRecordWithFlags


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
    at: int
    done: bool = False

    @property
    def handle(self) -> Event:
        return self

    def sync(self) -> None:
        self.driver.check_call()
        self.stream.execute_to(self)


@dataclass(eq=False)
class DriverEvent:
    """An event of the driver API, which can be recorded many times."""

    latest: Event | None = None


@dataclass(eq=False)
class Graph:
    """A captured graph: its work, the device memory that it uses, and events that each launch records."""

    nodes: list[tuple[Callable[[], None] | DriverEvent, list[tuple[int, int]]]] = field(default_factory=list)
    runs: list[Any] = field(default_factory=list)
    """Runs of sessions in it."""
    launches: int = 0
    destroyed: bool = False


@dataclass(eq=False)
class Stream:
    driver: FakeDriver
    index: int
    handle: int
    queue: list[Callable[[], None] | Event] = field(default_factory=list)
    capture: Graph | None = None
    closed: bool = False

    @property
    def device(self) -> Any:
        return SimpleNamespace(device_id=self.index)

    def put(self, work: Callable[[], None] | Event, memory: list[tuple[int, int]] | None = None) -> None:
        """Enqueue work that uses some device memory, given by addresses and sizes; in a capture, record it."""
        expect(not self.closed, "work on a closed stream")
        if self.capture is None:
            self.queue.append(work)
            return
        expect(memory is not None and not isinstance(work, Event), "work that a capture must not contain")
        assert not isinstance(work, Event)
        self.capture.nodes.append((work, memory or []))

    def record(self, options: Any = None) -> Event:
        self.driver.check_call()
        event = Event(self.driver, self, self.driver.tick())
        self.put(event)
        return event

    def launch(self, graph: Graph) -> None:
        expect(not graph.destroyed, "a destroyed graph is launched")
        graph.launches += 1
        for work, memory in graph.nodes:
            for address, nbytes in memory:
                self.driver.bytes_at(address, nbytes, queueing=True)
            if isinstance(work, DriverEvent):
                work.latest = self.record()
            else:
                self.put(work)

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
        expect(stream.capture is None, "memory is freed in a capture")

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
        self.driver.check_call(any_thread=not self.driver.open)
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
        self.graphs: list[Graph] = []
        self.events: list[DriverEvent] = []

    def make_stream(self, index: int = 0, handle: int | None = None) -> Stream:
        stream = Stream(self, index, 0xC0DE00 + 16 * len(self.streams) if handle is None else handle)
        self.streams[stream.handle] = stream
        return stream

    def tick(self) -> int:
        self.ticks += 1
        return self.ticks

    def check_call(self, *, any_thread: bool = False, stream: Stream | None = None) -> None:
        """Raise Misuse if CUDA must not be called now in this thread. Work on the stream that captures is allowed."""
        if not any_thread and not self.allow_other_threads:
            self.threads.add(threading.get_ident())
            expect(len(self.threads) == 1, "CUDA was called from a second thread")
        expect(not CAPTURE_LOCK._capturing or self.inside_run or (stream and stream.capture), "CUDA was called while a graph was captured")

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
        self.check_call(stream=stream)
        before: bytes | None = None
        pinned = next((one for at, one in self.pinned.items() if at <= source < at + one.size), None)
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
            expect(pinned is None or pinned.handle in self.pinned, "page-locked memory was freed before the copy was done")
            if source >= DEVICE_MEMORY:
                data = self.bytes_at(source, nbytes, queueing=False).tobytes()
            else:
                data = ctypes.string_at(source, nbytes)
                expect(data == before, "the host changed or dropped memory before the copy was done")
            if to >= DEVICE_MEMORY:
                self.bytes_at(to, nbytes, queueing=False)[:] = np.frombuffer(data, np.uint8)
            else:
                ctypes.memmove(to, data, nbytes)

        device_only = source >= DEVICE_MEMORY and to >= DEVICE_MEMORY
        stream.put(work, [(source, nbytes), (to, nbytes)] if device_only else None)
        return (Status.CUDA_SUCCESS,)

    def clear(self, address: int, value: int, nbytes: int, stream: Stream) -> tuple[Status]:
        self.check_call(stream=stream)
        self.bytes_at(address, nbytes, queueing=True)
        stream.put(lambda: self.bytes_at(address, nbytes, queueing=False).fill(value), [(address, nbytes)])
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

        def record(event: DriverEvent, handle: int, flags: int = 0) -> tuple[Status]:
            stream = machine.streams[handle]
            machine.check_call(stream=stream)
            expect((flags == EXTERNAL) == (stream.capture is not None), "an event is recorded with the wrong flag")
            if stream.capture is None:
                event.latest = stream.record()
            else:
                stream.capture.nodes.append((event, []))
            return (ok,)

        def create_event(flags: int) -> tuple[Status, DriverEvent]:
            machine.events.append(DriverEvent())
            return ok, machine.events[-1]

        def destroy_event(event: DriverEvent) -> tuple[Status]:
            machine.events.remove(event)
            return (ok,)

        def elapsed(start: DriverEvent, end: DriverEvent) -> tuple[Status, float | None]:
            machine.check_call()
            assert start.latest
            assert end.latest
            return (ok, float(end.latest.at - start.latest.at)) if end.latest.done else (Status.CUDA_ERROR_NOT_READY, None)

        def synchronize(event: DriverEvent) -> tuple[Status]:
            assert event.latest
            event.latest.sync()
            return (ok,)

        def begin_capture(handle: int, mode: int) -> tuple[Status]:
            stream = machine.streams[handle]
            expect(mode == THREAD_LOCAL, "a capture disturbs other threads")
            expect(CAPTURE_LOCK._capturing, "a graph is captured without the exclusive lock")
            expect(handle != LEGACY, "the default stream cannot be captured")
            expect(stream.capture is None, "a capture begins in a capture")
            stream.capture = Graph()
            return (ok,)

        def end_capture(handle: int) -> tuple[Status, Graph | None]:
            stream = machine.streams[handle]
            graph, stream.capture = stream.capture, None
            return ok, graph

        def instantiate(graph: Graph, flags: int) -> tuple[Status, Graph]:
            machine.graphs.append(graph)
            return ok, graph

        def launch(graph: Graph, handle: int) -> tuple[Status]:
            machine.check_call()
            machine.streams[handle].launch(graph)
            return (ok,)

        def destroy(graph: Graph) -> tuple[Status]:
            busy = (stream.queue for stream in machine.streams.values() if stream is not machine.legacy and not stream.closed)
            expect(not any(busy), "a graph is freed while it may run")
            graph.destroyed = True
            graph.nodes.clear()
            return (ok,)

        def wait_event(stream: int, event: DriverEvent, flags: int) -> tuple[Status]:
            expect(machine.pushed, "a default stream is used without a current context")
            recorded = event.latest
            assert recorded
            machine.streams[stream].put(lambda: recorded.stream.execute_to(recorded))
            machine.waits.append((stream, recorded))
            return (ok,)

        def push(context: Any) -> tuple[Status]:
            machine.pushed.append(context)
            return (ok,)

        core = SimpleNamespace(
            Device=Device,
            Stream=Streams,
            LEGACY_DEFAULT_STREAM=self.legacy,
            DeviceMemoryResource=Pool,
            DeviceMemoryResourceOptions=lambda: None,
            LegacyPinnedMemoryResource=PinnedResource,
            Buffer=Foreign,
        )
        driver = SimpleNamespace(
            CUmemPool_attribute=SimpleNamespace(CU_MEMPOOL_ATTR_RELEASE_THRESHOLD=1),
            CUstreamCaptureStatus=SimpleNamespace(CU_STREAM_CAPTURE_STATUS_NONE=0),
            CUstreamCaptureMode=SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=THREAD_LOCAL),
            CUevent_record_flags=SimpleNamespace(CU_EVENT_RECORD_EXTERNAL=EXTERNAL),
            cuuint64_t=int,
            cuCtxGetCurrent=lambda: (ok, "context"),
            cuCtxPushCurrent=push,
            cuCtxPopCurrent=lambda: (ok, machine.pushed.pop()),
            cuMemPoolSetAttribute=lambda pool, attribute, value: (ok,),
            cuMemPoolTrimTo=lambda pool, keep: (ok,),
            cuMemcpyAsync=lambda to, source, nbytes, handle: machine.copy(to, source, nbytes, machine.streams[handle]),
            cuMemsetD8Async=lambda address, value, nbytes, handle: machine.clear(address, value, nbytes, machine.streams[handle]),
            cuEventCreate=create_event,
            cuEventDestroy=destroy_event,
            cuEventRecord=record,
            cuEventRecordWithFlags=record,
            cuEventSynchronize=synchronize,
            cuEventElapsedTime=elapsed,
            cuStreamIsCapturing=lambda handle: (ok, int(machine.streams[handle].capture is not None)),
            cuStreamBeginCapture=begin_capture,
            cuStreamEndCapture=end_capture,
            cuGraphInstantiate=instantiate,
            cuGraphDestroy=lambda graph: (ok,),
            cuGraphLaunch=launch,
            cuGraphExecDestroy=destroy,
            cuStreamWaitEvent=wait_event,
        )
        return core, SimpleNamespace(StridedMemoryView=View), driver

    pushed: list[Any] = []  # noqa: RUF012 - CUDA has a stack per thread; tests use one thread at a time
