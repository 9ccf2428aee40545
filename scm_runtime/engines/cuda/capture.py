"""Sessions bound to fixed addresses of a device, and the CUDA graphs captured of their runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

from scm_runtime.engines.cuda.capture_lock import CAPTURE_LOCK
from scm_runtime.engines.cuda.stream import is_fatal
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.errors import GeneratorClosedError, InferenceError, OutOfMemoryError
from scm_runtime.ort.session import Bound, Region, Session

# Before a capture, which must not allocate. ONNX Runtime runs twice on its own account, after which its arena may still have to grow.
WARMUP_RUNS = 2

_log = logging.getLogger("scm_runtime")


class DeviceSession:
    """An open session, whether all of it runs on the device, and whether its runs may be captured."""

    def __init__(self, context: CudaContext, ort_session: Session, *, all_on_device: bool, capture: bool) -> None:
        self.context, self.ort_session, self.all_on_device, self.capture_enabled = context, ort_session, all_on_device, all_on_device and capture
        self.capture_count = 0
        self.shrink_arena = False
        """Whether the next run is to give back what the arena has spare."""

    def bind(self, inputs: Mapping[str, Region], output: Region, graph_id: int | None) -> BoundRun:
        """A run at these addresses, captured under this graph ID unless it is None."""
        return BoundRun(self, inputs, output, graph_id)


class BoundRun:
    """A session bound to fixed addresses."""

    def __init__(self, session: DeviceSession, inputs: Mapping[str, Region], output: Region, graph_id: int | None) -> None:
        self._session, self._inputs, self._output = session, dict(inputs), output
        self._graph_id = graph_id
        self._uncaptured: Bound | None = None
        self._captured: Bound | None = None

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph stands for it."""
        return self._captured is not None

    def __call__(self) -> None:
        """Put the work on the stream; the first time several times over, so that it can be captured.

        Raises:
            OutOfMemoryError: memory did not suffice.
            InferenceError: ONNX Runtime failed.
        """
        session = self._session
        if not session.all_on_device:
            self._run_with_copies()
        elif session.shrink_arena and not session.capture_count:
            session.shrink_arena = False
            self._run_and_shrink_arena()
        elif self._captured is not None:
            self._captured()
        elif self._graph_id is None or not session.capture_enabled:
            self._run_uncaptured()
        else:
            self._warm_up_and_capture(self._graph_id)

    def _run_uncaptured(self) -> None:
        if self._uncaptured is None:
            self._uncaptured = self._bind(None)
        self._uncaptured()

    def _run_with_copies(self) -> None:
        # What nodes on the CPU read, ONNX Runtime copies when it is bound and not when it runs, in no order with the stream.
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
                except (InferenceError, GeneratorClosedError) as error:
                    if not is_fatal(error):
                        session.context.stream.abort_capture()
                    raise
        except InferenceError as error:
            if is_fatal(error):
                raise
            self._graph_id = None
            # Memory that was not there while nothing could be allocated is a matter of this shape alone.
            session.capture_enabled = session.capture_enabled and isinstance(error, OutOfMemoryError)
            _log.info("'%s' runs without a CUDA graph for %d samples: %s", session.ort_session.path.name, self._output.shape[0], error)
            self._run_uncaptured()
        else:
            self._captured = bound
            session.capture_count += 1

    def _run_and_shrink_arena(self) -> None:
        try:
            self._bind(None, {"memory.enable_memory_arena_shrinkage": f"gpu:{self._session.context.index}"})()
        except InferenceError as error:
            if is_fatal(error) or isinstance(error, OutOfMemoryError):
                raise
            _log.debug("'%s' keeps its arena: %s", self._session.ort_session.path.name, error)
            self._run_uncaptured()

    def _bind(self, graph_id: int | None, options: Mapping[str, str] | None = None) -> Bound:
        # Everything is on one stream: nobody needs the end of a run but who fetches, and that waits for itself.
        entries = {"disable_synchronize_execution_providers": "1", "gpu_graph_id": "-1" if graph_id is None else str(graph_id), **(options or {})}
        return self._session.ort_session.bind(self._inputs, self._output, run_options=entries)


class EngineSessions(NamedTuple):
    """The sessions that a slot runs."""

    noise: DeviceSession
    step: DeviceSession
    finite: DeviceSession
    decode: DeviceSession
    combine: DeviceSession | None = None
    """Of a bundle with samplers."""

    @property
    def all(self) -> list[DeviceSession]:
        """Those there are."""
        return [session for session in self if session is not None]
