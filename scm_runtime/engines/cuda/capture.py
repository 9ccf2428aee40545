"""Sessions bound to fixed addresses of a device, and the CUDA graphs captured of their runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

from scm_runtime.engines.cuda.capture_lock import CAPTURES
from scm_runtime.engines.cuda.gpu import is_fatal
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.errors import GeneratorClosedError, InferenceError, OutOfMemoryError
from scm_runtime.ort.session import Bound, Region, Session

# Before a capture, which must not allocate. ONNX Runtime runs twice on its own account, after which its arena may still have to grow.
PREPARATIONS = 2

_log = logging.getLogger("scm_runtime")


class Graph:
    """An open session, whether all of it runs on the device, and whether its runs may be captured."""

    def __init__(self, context: CudaContext, session: Session, *, resident: bool, capture: bool) -> None:
        self.context, self.session, self.resident, self.capture = context, session, resident, resident and capture
        self.captured = 0
        self.shrink = False
        """Whether the next run is to give back what the arena has spare."""

    def bind(self, inputs: Mapping[str, Region], output: Region, number: int | None) -> Run:
        """A run at these addresses, captured under this number unless it is None."""
        return Run(self, inputs, output, number)


class Run:
    """A session bound to fixed addresses."""

    def __init__(self, graph: Graph, inputs: Mapping[str, Region], output: Region, number: int | None) -> None:
        self._graph, self._inputs, self._output = graph, dict(inputs), output
        self._number = number
        self._bound: Bound | None = None
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
        graph = self._graph
        if not graph.resident:
            self._run_copied()
        elif graph.shrink and not graph.captured:
            graph.shrink = False
            self._shrink()
        elif self._captured is not None:
            self._captured()
        elif self._number is None or not graph.capture:
            self._plain()
        else:
            self._capture(self._number)

    def _plain(self) -> None:
        if self._bound is None:
            self._bound = self._bind(None)
        self._bound()

    def _run_copied(self) -> None:
        # What nodes on the CPU read, ONNX Runtime copies when it is bound and not when it runs, in no order with the stream.
        self._graph.context.gpu.synchronize()
        self._graph.session.bind(self._inputs, self._output, run_options={"gpu_graph_id": "-1"})()

    def _capture(self, number: int) -> None:
        graph = self._graph
        for _ in range(PREPARATIONS):
            self._plain()
        bound = self._bind(number)
        try:
            with CAPTURES.alone():
                try:
                    bound()
                except (InferenceError, GeneratorClosedError) as error:
                    if not is_fatal(error):
                        graph.context.gpu.end_capture()
                    raise
        except InferenceError as error:
            if is_fatal(error):
                raise
            self._number = None
            # Memory that was not there while nothing could be allocated is a matter of this shape alone.
            graph.capture = graph.capture and isinstance(error, OutOfMemoryError)
            _log.info("'%s' runs without a CUDA graph for %d samples: %s", graph.session.path.name, self._output.shape[0], error)
            self._plain()
        else:
            self._captured = bound
            graph.captured += 1

    def _shrink(self) -> None:
        try:
            self._bind(None, {"memory.enable_memory_arena_shrinkage": f"gpu:{self._graph.context.index}"})()
        except InferenceError as error:
            if is_fatal(error) or isinstance(error, OutOfMemoryError):
                raise
            _log.debug("'%s' keeps its arena: %s", self._graph.session.path.name, error)
            self._plain()

    def _bind(self, number: int | None, options: Mapping[str, str] | None = None) -> Bound:
        # Everything is on one stream: nobody needs the end of a run but who fetches, and that waits for itself.
        entries = {"disable_synchronize_execution_providers": "1", "gpu_graph_id": "-1" if number is None else str(number), **(options or {})}
        return self._graph.session.bind(self._inputs, self._output, run_options=entries)


class Graphed(NamedTuple):
    """The sessions that a slot runs."""

    noise: Graph
    step: Graph
    finite: Graph
    decode: Graph
    combine: Graph | None = None
    """Of a bundle with samplers."""

    @property
    def all(self) -> list[Graph]:
        """Those there are."""
        return [graph for graph in self if graph is not None]
