"""A CUDA machine made of NumPy: what cuda-core, cuda-bindings and ONNX Runtime's CUDA provider do for ``scm_runtime.engines.cuda``, as far as it is used.

It is lazier and stricter than a device. Streams do nothing before somebody waits for them, so that a missing order, or host memory changed or read too early,
shows. New memory holds NaN. Addresses outside of a live allocation, calls in a wrong thread, and calls that spoil a capture are errors.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scm_runtime.common.runs import RunRegistry
from scm_runtime.devices.placement import CPU, Placement
from scm_runtime.engines.cuda.thread import CAPTURES
from scm_runtime.errors import InferenceError, OutOfMemoryError
from scm_runtime.ort.open_session import open_session
from scm_runtime.ort.options import SessionSettings
from scm_runtime.ort.session import DeviceTensor, Session

DEVICE_MEMORY = 0x7F00_0000_0000_0000  # above all addresses of a process
LEGACY = 1
PLACEMENT = Placement("cuda:0", (("CUDAExecutionProvider", {}), ("CPUExecutionProvider", {})), "device='cuda'")


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2


class Misuse(BaseException):
    """What a device would not forgive, or not notice. No handler of errors in between is to swallow it."""


def expect(condition: object, otherwise: str) -> None:
    if not condition:
        raise Misuse(otherwise)


class CudaError(Exception):
    """As cuda-core raises it."""


@dataclass(eq=False)
class Allocation:
    address: int
    data: NDArray[np.uint8]
    freed: bool = False
    """For whoever queues work from now on; the bytes stay until the stream gets there."""
    gone: bool = False


@dataclass(eq=False)
class Event:
    machine: Machine
    stream: Stream
    timed: bool
    at: int
    done: bool = False

    @property
    def handle(self) -> Event:
        return self

    def sync(self) -> None:
        self.machine.called()
        self.stream.execute_to(self)

    def __sub__(self, other: Event) -> float:
        expect(self.timed, "the later event has no time")
        expect(other.timed, "the earlier event has no time")
        expect(self.done, "the later event is not over")
        expect(other.done, "the earlier event is not over")
        return float(self.at - other.at)


@dataclass(eq=False)
class Stream:
    machine: Machine
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
        self.machine.called()
        event = Event(self.machine, self, bool(options and options.timing_enabled), self.machine.tick())
        self.put(event)
        return event

    def wait(self, event: Event) -> None:
        self.machine.called(anywhere=not self.machine.open)
        self.put(lambda: event.stream.execute_to(event))
        self.machine.waits.append((self.handle, event))

    def execute_to(self, event: Event) -> None:
        while not event.done:
            expect(self.queue, "waiting for an event that was never recorded")
            work = self.queue.pop(0)
            if isinstance(work, Event):
                work.done = True
            else:
                work()

    def close(self) -> None:
        self.machine.called()
        self.closed = True


class Buffer:
    """Of cuda-core: freed when it is collected, or closed before."""

    def __init__(self, machine: Machine, allocation: Allocation, stream: Stream, size: int) -> None:
        self._machine, self._allocation, self._stream, self.size = machine, allocation, stream, size
        self.handle = allocation.address

    def close(self, stream: Stream | None = None) -> None:
        if self._allocation.freed:
            return
        self._allocation.freed = True
        self._machine.called(anywhere=not self._machine.open)
        stream, allocation = stream or self._stream, self._allocation

        def free() -> None:
            allocation.gone = True

        if stream.closed:
            free()
        else:
            stream.put(free)
        self._machine.frees.append((allocation.address, stream.handle))

    def __del__(self) -> None:
        if not self._allocation.freed:
            self._allocation.freed = True
            self._machine.leaked.append(self._allocation.address)


class Pinned:
    def __init__(self, machine: Machine, size: int) -> None:
        self.data = np.full(size, 0xEE, np.uint8)
        self.handle, self.size, self.machine = self.data.ctypes.data, size, machine
        machine.pinned[self.handle] = self

    def close(self) -> None:
        self.machine.called()
        del self.machine.pinned[self.handle]


@dataclass(eq=False)
class Capsule:
    """What a consumer gets."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    versioned: bool
    keeps: Any


@dataclass(frozen=True)
class GraphRun:
    graph: str
    number: int
    """gpu_graph_id."""
    n: int
    shrinks: bool = False


class Machine:
    """Some devices, and all that happened on them."""

    def __init__(self, devices: int = 1, capacity: int = 1 << 30) -> None:
        self.capacity = capacity
        self.allocations: dict[int, Allocation] = {}
        self.next_address = DEVICE_MEMORY
        self.streams: dict[int, Stream] = {}
        self.legacy = self.make_stream(0, LEGACY)
        self.pinned: dict[int, Pinned] = {}
        self.threads: set[int] = set()
        self.foreign_ok = False
        self.open = True
        self.ticks = 0
        self.waits: list[tuple[int, Event]] = []
        self.frees: list[tuple[int, int]] = []
        self.leaked: list[int] = []
        self.to_host: list[int] = []
        self.runs: list[GraphRun] = []
        self.opened: list[tuple[str, bool]] = []
        self.device_syncs = 0
        self.refuses_graphs: set[str] = set()
        self.fails_to_capture: set[str] = set()
        self.terminates_capture = False
        self.no_memory_to_capture: set[int] = set()
        self.largest_batch: int | None = None
        self.fatal = False
        self.devices = devices

    def make_stream(self, index: int = 0, handle: int | None = None) -> Stream:
        stream = Stream(self, index, 0xC0DE00 + 16 * len(self.streams) if handle is None else handle)
        self.streams[stream.handle] = stream
        return stream

    def tick(self) -> int:
        self.ticks += 1
        return self.ticks

    def called(self, *, anywhere: bool = False) -> None:
        """Something of CUDA's was called here and now."""
        if not anywhere and not self.foreign_ok:
            self.threads.add(threading.get_ident())
            expect(len(self.threads) == 1, "CUDA was called in a second thread")
        expect(not CAPTURES._capturing or self.inside_run, "CUDA was called while a graph was captured")

    inside_run = False

    @property
    def used(self) -> int:
        return sum(len(one.data) for one in self.allocations.values() if not one.freed)

    def allocate(self, size: int, stream: Stream) -> Buffer:
        self.called()
        if self.used + size > self.capacity:
            raise CudaError("CUDA_ERROR_OUT_OF_MEMORY: The API call failed because it was unable to allocate enough memory")
        allocation = Allocation(self.next_address, np.full(size, 0xFF, np.uint8))
        self.next_address += size + 4096 & ~0xFF
        self.allocations[allocation.address] = allocation
        return Buffer(self, allocation, stream, size)

    def bytes_at(self, address: int, nbytes: int, *, queueing: bool) -> NDArray[np.uint8]:
        """The bytes at an address of the device's."""
        for one in self.allocations.values():
            if one.address <= address and address + nbytes <= one.address + len(one.data):
                expect(not (one.freed if queueing else one.gone), "memory is used after it was freed")
                return one.data[address - one.address : address - one.address + nbytes]
        raise Misuse(f"{nbytes} bytes at {address:#x} are not in the device's memory")

    def copy(self, to: int, source: int, nbytes: int, stream: Stream) -> tuple[Status]:
        self.called()
        before: bytes | None = None
        if source >= DEVICE_MEMORY:
            self.bytes_at(source, nbytes, queueing=True)
        else:
            before = ctypes.string_at(source, nbytes)
        if to >= DEVICE_MEMORY:
            self.bytes_at(to, nbytes, queueing=True)
        else:
            expect(any(at <= to and to + nbytes <= at + pinned.size for at, pinned in self.pinned.items()), "the host's side of a copy is not pinned")
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
        """cuda.core, cuda.core.utils and cuda.bindings.driver."""
        machine = self
        ok = Status.CUDA_SUCCESS

        class Device:
            properties = SimpleNamespace(memory_pools_supported=True)

            def __init__(self, index: int) -> None:
                self.device_id = index
                self.memory_resource = object()

            def set_current(self) -> None:
                machine.called()

            def create_stream(self) -> Stream:
                machine.called()
                return machine.make_stream(self.device_id)

            def sync(self) -> None:
                machine.device_syncs += 1

        class Pool:
            handle = "pool"

            def __init__(self, device: Device, options: Any) -> None:
                machine.called()

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
            """A buffer over memory that something else owns."""

            @staticmethod
            def from_handle(address: int, size: int, *, owner: Any) -> Any:
                expect(machine.pushed, "memory is looked at without a context")
                return SimpleNamespace(handle=address, size=size, owner=owner)

        class View:
            @staticmethod
            def from_buffer(buffer: Any, shape: tuple[int, ...], *, dtype: np.dtype[Any]) -> Any:
                def dlpack(*, max_version: tuple[int, int] | None = None) -> Capsule:
                    return Capsule(buffer.handle, shape, dtype, max_version is not None and max_version >= (1, 0), buffer)

                return SimpleNamespace(__dlpack__=dlpack)

        class PinnedResource:
            def allocate(self, size: int) -> Pinned:
                machine.called()
                return Pinned(machine, size)

        def end_capture(handle: int) -> tuple[Status, int]:
            machine.streams[handle].capturing = False
            return ok, 0

        def wait_event(stream: int, event: Event, flags: int) -> tuple[Status]:
            expect(machine.pushed, "a default stream was named without a context")
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

    pushed: list[Any] = []  # noqa: RUF012 - per thread in CUDA; tests use one at a time

    def open_session(self, path: Path, settings: SessionSettings) -> Session:
        """A session as ONNX Runtime's CUDA provider would open it, that computes on the CPU."""
        options = settings.placement.providers[0][1]
        capture = options["enable_cuda_graph"] == "1"
        self.opened.append((path.name, capture))
        self.called()
        if capture and path.name in self.refuses_graphs:
            raise InferenceError("This session cannot use the graph capture feature as requested by the user")
        return FakeSession(self, path, settings, self.streams[int(options["user_compute_stream"])], capture)


class FakeSession(Session):
    def __init__(self, machine: Machine, path: Path, settings: SessionSettings, stream: Stream, capture: bool) -> None:
        on_cpu = replace(settings, placement=CPU, threads=1)
        super().__init__(path, open_session(path, on_cpu)._session, on_cpu)
        self.settings = settings
        self.machine, self.stream, self.capture = machine, stream, capture
        self.resident = path.name not in machine.refuses_graphs
        self.captured: dict[int, tuple[Any, ...]] = {}

    def bind(self, inputs: Mapping[str, DeviceTensor], output: DeviceTensor, *, run_options: Mapping[str, str] | None = None) -> Any:
        return FakeBound(self, dict(inputs), output, dict(run_options or {}))


class FakeBound:
    def __init__(self, session: FakeSession, inputs: dict[str, DeviceTensor], output: DeviceTensor, options: dict[str, str]) -> None:
        self.session, self.inputs, self.output, self.options = session, inputs, output, options
        # What a node on the CPU reads is copied here, and not in the order of the stream.
        self.arrays = None if session.resident else self._read()
        expect(session.resident or not session.stream.queue, "inputs are copied before the stream is done")

    def __call__(self) -> None:
        with self.session.settings.runs.run():
            self._run()

    def _run(self) -> None:
        session, machine, number = self.session, self.session.machine, int(self.options.get("gpu_graph_id", "0"))
        name, n = session.path.name, self.output.shape[0]
        machine.inside_run = True
        try:
            machine.called()
            machine.runs.append(GraphRun(name, number, n, "memory.enable_memory_arena_shrinkage" in self.options))
            waits = self.options.get("disable_synchronize_execution_providers") != "1"
            expect(waits != session.resident, "a run waits for the device, or does not where it has to")
            if machine.fatal:
                raise InferenceError(f"'{name}' failed: CUDA failure 700: an illegal memory access was encountered ; GPU=0.")
            if machine.largest_batch is not None and n > machine.largest_batch:
                raise OutOfMemoryError(f"'{name}' failed: Failed to allocate memory for requested buffer of size 123")
            for region in (*self.inputs.values(), self.output):
                machine.bytes_at(region.address, _nbytes(region), queueing=True)
            if session.capture and number != -1:
                self._capture_or_replay(number)
            session.stream.put(self._compute)
        finally:
            machine.inside_run = False

    def _capture_or_replay(self, number: int) -> None:
        session, machine = self.session, self.session.machine
        addresses = (self.output, *sorted(self.inputs.items()))
        if number in session.captured:
            expect(session.captured[number] == addresses, "a captured graph is replayed with other addresses")
            expect(not machine.runs[-1].shrinks, "memory of a captured graph is given back")
            return
        expect(CAPTURES._capturing, "other threads may call CUDA while a graph is captured")
        expect(session.stream.handle != LEGACY, "the default stream cannot be captured")
        if self.output.shape[0] in machine.no_memory_to_capture:
            raise OutOfMemoryError(f"'{session.path.name}' failed: Failed to allocate memory for requested buffer of size 123")
        if machine.terminates_capture:
            session.stream.capturing = True
            session.settings.runs.terminate()
            session.settings.runs.check()
        if session.path.name in machine.fails_to_capture:
            session.stream.capturing = True  # as it was left
            raise InferenceError(f"'{session.path.name}' failed: operation not permitted when stream is capturing.")
        session.captured[number] = addresses

    def _read(self) -> dict[str, NDArray[Any]]:
        return {
            name: self.session.machine.bytes_at(at.address, _nbytes(at), queueing=False).view(at.dtype).reshape(at.shape).copy()
            for name, at in self.inputs.items()
        }

    def _compute(self) -> None:
        machine = self.session.machine
        session = self.session
        settings, session.settings = session.settings, replace(session.settings, runs=RunRegistry())  # nothing terminates what is on a stream already
        try:
            result = session(**(self.arrays or self._read()))
        finally:
            session.settings = settings
        expect((result.dtype, result.shape) == (np.dtype(self.output.dtype), self.output.shape), "the output does not fit its place")
        machine.bytes_at(self.output.address, _nbytes(self.output), queueing=False)[:] = np.ascontiguousarray(result).reshape(-1).view(np.uint8)


def _nbytes(region: DeviceTensor) -> int:
    return np.dtype(region.dtype).itemsize * prod(region.shape)
