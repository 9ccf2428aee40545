"""A simulated CUDA machine: the devices of fake_cuda_driver, and sessions that behave as with ONNX Runtime's CUDA provider but compute on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import scm_runtime
from runtime.fake_cuda_driver import FakeDriver, Graph, Stream, expect
from scm_runtime.bundle.manifest import read_manifest
from scm_runtime.bundle.solver_tables import from_times
from scm_runtime.common.runs import CancelScope, RunRegistry
from scm_runtime.devices.placement import CPU, Placement
from scm_runtime.engines.engine import Trajectory
from scm_runtime.errors import InferenceError, OutOfMemoryError
from scm_runtime.inputs.call import Call
from scm_runtime.ort.open_session import open_session
from scm_runtime.ort.options import SessionSettings
from scm_runtime.ort.session import DeviceTensor, Session

PLACEMENT = Placement("cuda:0", (("CUDAExecutionProvider", {}), ("CPUExecutionProvider", {})), "device='cuda'")
DIGITS = Path(scm_runtime.__file__).parent / "bundles" / "digits.scm"
MANIFEST = read_manifest(DIGITS)


def call(*seeds: int, steps: int = 2, latents: NDArray[np.float32] | None = None) -> Trajectory:
    """Return a call of the digits bundle. The label of a sample is the last digit of its seed."""
    labels = np.array([seed % 10 for seed in seeds], np.int64)
    return Trajectory(Call(np.array(seeds, np.int64), {"class_labels": labels}, from_times(MANIFEST.times[str(steps)]), latents))


@dataclass(frozen=True)
class GraphRun:
    """A run of a session on a batch of n samples, which is done or becomes a part of a captured graph."""

    graph: str
    captured: bool
    n: int
    shrinks: bool = False


class Machine(FakeDriver):
    """Simulated devices, a record of the sessions opened and run on them, and faults that tests inject.

    Attributes:
        runs: all runs of sessions, in order, without those that a launch of a captured graph repeats.
        opened: file name of each graph that was opened, and whether with ``enable_cuda_graph``.
        refuses_graphs: file names of graphs that have nodes on the CPU.
        fails_to_capture: file names of graphs whose captures fail.
        terminates_capture: whether the Generator is closed during the next capture.
        no_memory_to_capture: batch sizes whose captures run out of memory.
        largest_batch: larger batches run out of memory; None for no limit.
        fatal: whether runs fail with an error that leaves the context unusable.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[GraphRun] = []
        self.opened: list[tuple[str, bool]] = []
        self.refuses_graphs: set[str] = set()
        self.fails_to_capture: set[str] = set()
        self.terminates_capture = False
        self.no_memory_to_capture: set[int] = set()
        self.largest_batch: int | None = None
        self.fatal = False

    def open_session(self, path: Path, settings: SessionSettings) -> Session:
        """Open a graph as with ONNX Runtime's CUDA provider, but on the CPU."""
        options = settings.placement.providers[0][1]
        capture = options["enable_cuda_graph"] == "1"
        self.opened.append((path.name, capture))
        self.check_call()
        if capture and path.name in self.refuses_graphs:
            raise InferenceError("This session cannot use the graph capture feature as requested by the user")
        return FakeSession(self, path, settings, self.streams[int(options["user_compute_stream"])], capture)


class FakeSession(Session):
    """A session on the CPU, whose bound runs read and write the memory of a simulated device."""

    def __init__(self, machine: Machine, path: Path, settings: SessionSettings, stream: Stream, capture: bool) -> None:
        on_cpu = replace(settings, placement=CPU, threads=1)
        super().__init__(path, open_session(path, on_cpu)._session, on_cpu)
        self.settings = settings
        self.machine, self.stream, self.capture = machine, stream, capture
        self.all_on_device = path.name not in machine.refuses_graphs

    def bind(self, inputs: Mapping[str, DeviceTensor], output: DeviceTensor, *, run_options: Mapping[str, str] | None = None) -> Any:
        return FakeBound(self, dict(inputs), output, dict(run_options or {}))


class FakeBound:
    """A FakeSession bound to device addresses. A call enqueues a run on the session's stream."""

    def __init__(self, session: FakeSession, inputs: dict[str, DeviceTensor], output: DeviceTensor, options: dict[str, str]) -> None:
        self.session, self.inputs, self.output, self.options = session, inputs, output, options
        # The inputs of CPU nodes are copied when they are bound, not in the order of the stream.
        self.arrays = None if session.all_on_device else self._read()
        expect(session.all_on_device or not session.stream.queue, "inputs are copied while the stream has pending work")

    def __call__(self) -> None:
        with self.session.settings.runs.run():
            self._run()

    def _run(self) -> None:
        session, machine, graph = self.session, self.session.machine, self.session.stream.capture
        name, n = session.path.name, self.output.shape[0]
        machine.inside_run = True
        try:
            machine.check_call()
            run = GraphRun(name, graph is not None, n, "memory.enable_memory_arena_shrinkage" in self.options)
            machine.runs.append(run)
            waits = self.options.get("disable_synchronize_execution_providers") != "1"
            expect(waits != session.all_on_device, "a run must wait for the device only if it has nodes on the CPU")
            expect(self.options["gpu_graph_id"] == "-1", "ONNX Runtime captures the run")
            if machine.fatal:
                raise InferenceError(f"'{name}' failed: CUDA failure 700: an illegal memory access was encountered ; GPU=0.")
            if machine.largest_batch is not None and n > machine.largest_batch:
                raise OutOfMemoryError(f"'{name}' failed: Failed to allocate memory for requested buffer of size 123")
            memory = [(region.address, _nbytes(region)) for region in (*self.inputs.values(), self.output)]
            for address, nbytes in memory:
                machine.bytes_at(address, nbytes, queueing=True)
            live = [one for other in machine.graphs if not other.destroyed for one in other.runs]
            expect(not run.shrinks or not any(one.graph == name for one in live), "memory of a captured graph is freed")
            if graph is not None:
                self._capture(graph, run)
            session.stream.put(self._compute, memory)
        finally:
            machine.inside_run = False

    def _capture(self, graph: Graph, run: GraphRun) -> None:
        session, machine = self.session, self.session.machine
        expect(session.capture, "a session with nodes on the CPU is captured")
        if run.n in machine.no_memory_to_capture:
            raise OutOfMemoryError(f"'{run.graph}' failed: Failed to allocate memory for requested buffer of size 123")
        if machine.terminates_capture:
            session.settings.runs.terminate()
            session.settings.runs.check()
        if run.graph in machine.fails_to_capture:
            raise InferenceError(f"'{run.graph}' failed: operation not permitted when stream is capturing.")
        graph.runs.append(run)

    def _read(self) -> dict[str, NDArray[Any]]:
        return {
            name: self.session.machine.bytes_at(at.address, _nbytes(at), queueing=False).view(at.dtype).reshape(at.shape).copy()
            for name, at in self.inputs.items()
        }

    def _compute(self) -> None:
        machine = self.session.machine
        session = self.session
        settings, session.settings = session.settings, replace(session.settings, runs=RunRegistry())  # enqueued work is not terminated
        try:
            result = CancelScope().call(lambda: session(**(self.arrays or self._read())))
        finally:
            session.settings = settings
        expect((result.dtype, result.shape) == (np.dtype(self.output.dtype), self.output.shape), "the output does not fit its buffer")
        machine.bytes_at(self.output.address, _nbytes(self.output), queueing=False)[:] = np.ascontiguousarray(result).reshape(-1).view(np.uint8)


def _nbytes(region: DeviceTensor) -> int:
    return np.dtype(region.dtype).itemsize * prod(region.shape)
