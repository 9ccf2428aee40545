"""Sessions bound to fixed device addresses, and the capture and replay of their runs as CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from scm_runtime.common.log import log
from scm_runtime.engines.cuda.capture_lock import CAPTURE_LOCK
from scm_runtime.engines.cuda.stream import is_fatal
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.errors import InferenceError, OutOfMemoryError, ScmError
from scm_runtime.ort.session import BoundSession, DeviceTensor, Session

# Runs before a capture, during which nothing may be allocated. ONNX Runtime adds two warm-up runs of its own, and its arena may still grow after those.
WARMUP_RUNS = 2


class DeviceSession:
    """An ONNX Runtime session on a CUDA device, with what is known about its nodes and its captures.

    Attributes:
        all_on_device: whether all of the graph's nodes run on the device.
        capture_enabled: whether its runs are captured; set to False after a capture failed.
        capture_count: number of CUDA graphs captured so far, including those given back.
        live_captures: number of CUDA graphs that may be replayed.
        shrink_arena: whether the next run frees the unused memory of the session's arena.
    """

    def __init__(self, context: CudaContext, ort_session: Session, *, all_on_device: bool, capture: bool) -> None:
        self.context, self.ort_session, self.all_on_device, self.capture_enabled = context, ort_session, all_on_device, all_on_device and capture
        self.capture_count = self.live_captures = 0
        self.shrink_arena = False

    def bind(self, inputs: Mapping[str, DeviceTensor], output: DeviceTensor, graph_id: int | None) -> BoundRun:
        """Bind the session to device tensors. Its runs are captured under ``graph_id``, unless that is None."""
        return BoundRun(self, inputs, output, graph_id)


class BoundRun:
    """A session bound to fixed device addresses. Calling it enqueues a run."""

    def __init__(self, session: DeviceSession, inputs: Mapping[str, DeviceTensor], output: DeviceTensor, graph_id: int | None) -> None:
        self._session, self._inputs, self._output = session, dict(inputs), output
        self._graph_id = graph_id
        self._uncaptured: BoundSession | None = None
        self._captured: BoundSession | None = None

    @property
    def captured(self) -> bool:
        """Whether the run was captured, and calls replay the CUDA graph."""
        return self._captured is not None

    def __call__(self) -> None:
        """Enqueue the work on the stream. A call that captures enqueues it several times, to warm up.

        Raises:
            OutOfMemoryError: the device is out of memory.
            InferenceError: ONNX Runtime failed.
            GeneratorClosedError, or the error of a cancelled CancelScope: the run was terminated.
        """
        session = self._session
        if not session.all_on_device:
            self._run_with_copies()
        elif session.shrink_arena and not session.live_captures:
            session.shrink_arena = False
            self._run_and_shrink_arena()
        elif self._captured is not None:
            self._captured()
        elif self._graph_id is None or not session.capture_enabled:
            self._run_uncaptured()
        else:
            self._warm_up_and_capture(self._graph_id)

    def release(self) -> None:
        """Give back the captured graph, if there is one. The run must not be called afterwards."""
        if self._captured is None or self._graph_id is None:
            return
        self._captured = None
        self._session.live_captures -= 1
        self._session.ort_session.release_captured_graph(self._graph_id)

    def _run_uncaptured(self) -> None:
        if self._uncaptured is None:
            self._uncaptured = self._bind(None)
        self._uncaptured()

    def _run_with_copies(self) -> None:
        # ONNX Runtime copies the inputs of CPU nodes when they are bound, not when the session runs, and not in the order of the stream.
        self._session.context.stream.synchronize()
        self._session.ort_session.bind(self._inputs, self._output, run_options={"gpu_graph_id": "-1"})()

    def _warm_up_and_capture(self, graph_id: int) -> None:
        session = self._session
        for _ in range(WARMUP_RUNS):
            self._run_uncaptured()
        bound = self._bind(graph_id)
        try:
            with CAPTURE_LOCK.exclusive():
                try:
                    bound()
                except ScmError as error:
                    if not is_fatal(error):
                        session.context.stream.abort_capture()
                    raise
        except InferenceError as error:
            if is_fatal(error):
                raise
            self._graph_id = None
            # Out of memory concerns this shape only: nothing may be allocated during a capture. After any other failure the session is not captured again.
            session.capture_enabled = session.capture_enabled and isinstance(error, OutOfMemoryError)
            log.info("'%s' runs without a CUDA graph for a batch of %d: %s", session.ort_session.path.name, self._output.shape[0], error)
            self._run_uncaptured()
        else:
            self._captured = bound
            session.capture_count += 1
            session.live_captures += 1

    def _run_and_shrink_arena(self) -> None:
        try:
            self._bind(None, {"memory.enable_memory_arena_shrinkage": f"gpu:{self._session.context.index}"})()
        except InferenceError as error:
            if is_fatal(error) or isinstance(error, OutOfMemoryError):
                raise
            log.debug("'%s' could not shrink its arena: %s", self._session.ort_session.path.name, error)
            self._run_uncaptured()

    def _bind(self, graph_id: int | None, options: Mapping[str, str] | None = None) -> BoundSession:
        # All work is on one stream. Only downloads need the end of a run, and they synchronize themselves.
        entries = {"disable_synchronize_execution_providers": "1", "gpu_graph_id": "-1" if graph_id is None else str(graph_id), **(options or {})}
        return self._session.ort_session.bind(self._inputs, self._output, run_options=entries)


class EngineSessions(NamedTuple):
    """The sessions of an engine's loop."""

    noise: DeviceSession
    step: DeviceSession
    finite: DeviceSession
    decode: DeviceSession
    combine: DeviceSession | None = None
    """None if the bundle has no samplers."""

    @property
    def all(self) -> list[DeviceSession]:
        """The sessions that are not None."""
        return [session for session in self if session is not None]
