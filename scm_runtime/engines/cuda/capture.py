"""Sessions bound to fixed device addresses, and the capture of repeated work as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from scm_runtime.common.log import log
from scm_runtime.engines.cuda.capture_lock import CAPTURE_LOCK
from scm_runtime.engines.cuda.cuda_errors import is_fatal
from scm_runtime.engines.cuda.stream import CudaStream
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.errors import InferenceError, OutOfMemoryError
from scm_runtime.ort.session import BoundSession, DeviceTensor, Session

# Runs before a capture, during which nothing may be allocated: ONNX Runtime allocates in the first run of a shape, and by another plan in the second.
WARMUP_RUNS = 2
# A capture can fail for a passing reason, such as another thread that synchronizes the device.
CAPTURE_ATTEMPTS = 2


@dataclass
class CaptureSwitch:
    """Whether some work may be captured. A capture that fails for another reason than memory turns it off."""

    enabled: bool


@dataclass
class LiveGraphs:
    """The number of CUDA graphs of an engine that may be launched. They hold addresses of the sessions' arenas, which must not shrink meanwhile."""

    count: int = 0


class RepeatedWork:
    """Work that is enqueued again and again at the same addresses. Its first call captures it as a CUDA graph if that is possible; later calls launch it."""

    def __init__(self, stream: CudaStream, enqueue: Callable[[bool], None], switch: CaptureSwitch, live: LiveGraphs, failed: str) -> None:
        """Describe the work.

        Args:
            stream: the stream that the work is enqueued on.
            enqueue: enqueues the work; doing it again must change nothing. The argument is True in a capture.
            switch: whether it may be captured.
            live: counts the graph while it exists.
            failed: what the log says if the capture fails, before the reason.
        """
        self._stream, self._enqueue, self._switch, self._live, self._failed = stream, enqueue, switch, live, failed
        self._may_capture = True
        self._graph: Any = None

    @property
    def captured(self) -> bool:
        """Whether calls launch a CUDA graph."""
        return self._graph is not None

    @property
    def waits(self) -> bool:
        """Whether the next call captures the work."""
        return self._graph is None and self._may_capture and self._switch.enabled

    def __call__(self) -> None:
        """Enqueue the work on the stream. A call that captures enqueues it several times, to warm up.

        Raises:
            OutOfMemoryError: the device is out of memory.
            InferenceError: ONNX Runtime failed.
            GeneratorClosedError, or the error of a cancelled CancelScope: a run was terminated.
        """
        if self._graph is not None:
            self._stream.graphs.launch(self._graph)
        elif self.waits:
            self._warm_up_and_capture()
        else:
            self._enqueue(False)

    def release(self) -> None:
        """Free the CUDA graph, whose launches must be done. The work is not captured again."""
        self._may_capture = False
        if self._graph is not None:
            graph, self._graph = self._graph, None
            self._live.count -= 1
            self._stream.graphs.destroy(graph)

    def _warm_up_and_capture(self) -> None:
        for _ in range(CAPTURE_ATTEMPTS):
            for _ in range(WARMUP_RUNS):
                self._enqueue(False)
            try:
                self._graph = self._capture()
            except InferenceError as error:
                if is_fatal(error):
                    raise
                failure, out_of_memory = str(error), isinstance(error, OutOfMemoryError)  # not the error: its traceback would keep this frame
                if out_of_memory:
                    break  # for this shape only
            else:
                self._live.count += 1
                self._stream.graphs.launch(self._graph)
                return
        self._may_capture = False
        self._switch.enabled = self._switch.enabled and out_of_memory
        log.info("%s: %s", self._failed, failure)
        self._enqueue(False)

    def _capture(self) -> Any:
        with CAPTURE_LOCK.exclusive():
            self._stream.graphs.begin()
            try:
                self._enqueue(True)
                return self._stream.graphs.end()
            except BaseException as error:
                if not is_fatal(error):
                    self._stream.graphs.abort()
                raise


class DeviceSession:
    """An ONNX Runtime session on a CUDA device.

    Attributes:
        all_on_device: whether all of the graph's nodes run on the device.
        switch: whether its runs may be captured.
        live: the CUDA graphs of its engine.
        shrink_arena: whether the next run without a live CUDA graph frees the unused memory of the session's arena.
    """

    def __init__(self, context: CudaContext, ort_session: Session, live: LiveGraphs, *, all_on_device: bool, capture: bool) -> None:
        self.context, self.ort_session, self.live, self.all_on_device = context, ort_session, live, all_on_device
        self.switch = CaptureSwitch(all_on_device and capture)
        self.shrink_arena = False

    def bind(self, inputs: Mapping[str, DeviceTensor], output: DeviceTensor) -> BoundRun:
        """Bind the session to device tensors."""
        return BoundRun(self, inputs, output)

    def repeated(self, inputs: Mapping[str, DeviceTensor], output: DeviceTensor, *, capture: bool) -> RepeatedWork:
        """Bind the session to device tensors. The runs are captured, if ``capture`` is True and the session allows it."""
        run, switch = self.bind(inputs, output), self.switch if capture else CaptureSwitch(False)
        failed = f"'{self.ort_session.path.name}' runs without a CUDA graph for a batch of {output.shape[0]}"
        return RepeatedWork(self.context.stream, lambda _: run(), switch, self.live, failed)


class BoundRun:
    """A session bound to fixed device addresses. Calling it enqueues a run."""

    def __init__(self, session: DeviceSession, inputs: Mapping[str, DeviceTensor], output: DeviceTensor) -> None:
        self._session, self._inputs, self._output = session, dict(inputs), output
        self._bound: BoundSession | None = None

    def __call__(self) -> None:
        """Enqueue a run. Raises what a run of ``RepeatedWork`` raises."""
        session = self._session
        if not session.all_on_device:
            self._run_with_copies()
        elif session.shrink_arena and not session.live.count:
            session.shrink_arena = False
            self._run_and_shrink_arena()
        else:
            self._run()

    def _run(self) -> None:
        if self._bound is None:
            self._bound = self._bind()
        self._bound()

    def _run_with_copies(self) -> None:
        # ONNX Runtime copies the inputs of CPU nodes when they are bound, not when the session runs, and not in the order of the stream.
        self._session.context.stream.synchronize()
        self._session.ort_session.bind(self._inputs, self._output, run_options={"gpu_graph_id": "-1"})()

    def _run_and_shrink_arena(self) -> None:
        try:
            self._bind({"memory.enable_memory_arena_shrinkage": f"gpu:{self._session.context.index}"})()
        except InferenceError as error:
            if is_fatal(error) or isinstance(error, OutOfMemoryError):
                raise
            log.debug("'%s' could not shrink its arena: %s", self._session.ort_session.path.name, error)
            self._run()

    def _bind(self, options: Mapping[str, str] | None = None) -> BoundSession:
        # All work is on one stream: only downloads wait for its end. ONNX Runtime's own captures are not used.
        entries = {"disable_synchronize_execution_providers": "1", "gpu_graph_id": "-1", **(options or {})}
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
