"""Static device buffers per batch shape, with the sessions bound to them: CUDA graphs replay at the addresses at which they were captured."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod

import numpy as np

from scm_runtime.bundle.manifest import Manifest
from scm_runtime.engines.cuda.blocks import TensorBlock, TensorSpec
from scm_runtime.engines.cuda.capture import BoundRun, EngineSessions
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.ort.session import DeviceTensor

# Maximum number of batch shapes that are captured at the same time.
MAX_GRAPHS = 8
# Maximum number of captures of a session. Some versions of ONNX Runtime keep captured graphs that were given back.
MAX_CAPTURES = 32
# A captured shape gives its place to another after so many evaluations of other shapes. Capturing costs several runs.
IDLE_USES = 200
# Maximum number of batch shapes without a captured graph whose buffers are kept.
MAX_UNCAPTURED = 8

BatchShape = tuple[int, tuple[tuple[str, tuple[int, ...]], ...]]
"""Batch size N, and the name of each conditioning input with its shape without N."""


class StaticBuffers:
    """The buffers of batches of one shape, and the runs bound to them.

    Attributes:
        block: all tensors but the decoder's output.
        loaded: serial numbers of the states whose seeds and conditioning are in the buffers.
        last_use: when ``StaticBufferCache`` last returned the buffers, by its own count.
        noise, step, check: runs of the noise graph, the step graph and the graph that flags samples with NaN or infinity.
    """

    def __init__(
        self,
        context: CudaContext,
        sessions: EngineSessions,
        manifest: Manifest,
        shape: BatchShape,
        dtypes: Mapping[str, type[np.generic]],
        graph_id: int | None,
    ) -> None:
        """Allocate all buffers but the decoder's output, which the first ``decode`` allocates. Raises OutOfMemoryError."""
        n, sizes = shape
        self.graph_id = graph_id
        self.last_use = 0
        self._context, self._sessions = context, sessions
        state: TensorSpec = (np.float32, (n, *manifest.sample.shape))
        conditioning: dict[str, TensorSpec] = {name: (dtypes[name], (n, *shape)) for name, shape in sizes}
        self.block = block = TensorBlock(
            context,
            {
                "t": (np.float32, (n,)),
                "t_next": (np.float32, (n,)),
                "draw": (np.int64, ()),
                "scale": (np.float32, ()),
                "seeds": (np.int64, (n,)),
                **{f"conditioning {name}": spec for name, spec in conditioning.items()},
                "finite": (np.float32, (n,)),
                "noise": state,
                "x": state,
                "x_next": state,
                **({} if sessions.combine is None else {"base": state, "weights": (np.float32, (n, 3))}),
            },
        )
        self.loaded: tuple[int, ...] = ()
        tensor = block.tensor
        inputs = {name: tensor(f"conditioning {name}") for name in conditioning}
        self.noise = sessions.noise.bind({name: tensor(name) for name in ("seeds", "draw", "scale")}, tensor("noise"), graph_id)
        self.step = sessions.step.bind({name: tensor(name) for name in ("x", "t", "t_next", "noise")} | inputs, tensor("x_next"), graph_id)
        flat = tensor("x_next")._replace(shape=(n, prod(manifest.sample.shape)))
        self.check = sessions.finite.bind({"x": flat}, tensor("finite"), graph_id)
        self._combine: BoundRun | None = None
        if sessions.combine is not None:
            summands = {"x": tensor("x"), "base": tensor("base"), "result": tensor("noise"), "weights": tensor("weights")}
            self._combine = sessions.combine.bind(summands, tensor("x_next"), graph_id)
        decoded = np.uint8 if manifest.output.kind == "image" else np.float32
        self._decoded: TensorSpec = (decoded, (n, *manifest.output.shape))
        self._decoder: tuple[TensorBlock, BoundRun] | None = None

    def combine(self) -> None:
        """Compute ``x_next`` from ``x``, ``base`` and the result of an evaluation, which was copied to ``noise``."""
        assert self._combine is not None
        self._combine()

    def decode(self) -> DeviceTensor:
        """Decode ``x`` and return the tensor with the result, which the next call overwrites. Raises OutOfMemoryError."""
        if self._decoder is None:
            block = TensorBlock(self._context, {"decoded": self._decoded})
            self._decoder = block, self._sessions.decode.bind({"x": self.block.tensor("x")}, block.tensor("decoded"), self.graph_id)
        block, run = self._decoder
        run()
        return block.tensor("decoded")

    @property
    def captured(self) -> bool:
        """Whether any of the runs was captured as a CUDA graph."""
        return any(run.captured for run in self._runs())

    def release(self) -> None:
        """Give back the captured graphs. The buffers must not be used afterwards."""
        if self.captured:
            self._context.stream.synchronize()  # no graph is destroyed while it runs
        for run in self._runs():
            run.release()

    def _runs(self) -> Sequence[BoundRun]:
        optional = (self._combine, self._decoder and self._decoder[1])
        return (self.noise, self.step, self.check, *(run for run in optional if run))


@dataclass
class StaticBufferCache:
    """The static buffers of recent batch shapes, least recently used first."""

    context: CudaContext
    sessions: EngineSessions
    manifest: Manifest

    def __post_init__(self) -> None:
        self._buffers: OrderedDict[BatchShape, StaticBuffers] = OrderedDict()
        self._graph_ids = count(1)  # no ID is used twice: ONNX Runtime counts warm-up runs per ID, not per shape
        self._uses = 0

    def get(self, shape: BatchShape, dtypes: Mapping[str, type[np.generic]]) -> StaticBuffers:
        """Return the buffers for a batch shape, allocating them if needed. Raises OutOfMemoryError."""
        self._uses += 1
        buffers = self._buffers.get(shape)
        if buffers is None or (buffers.graph_id is None and self._make_room_to_capture()):
            if buffers is not None:
                del self._buffers[shape]
            others = [other for other, kept in self._buffers.items() if not kept.captured]
            if len(others) >= MAX_UNCAPTURED:
                del self._buffers[others[0]]
            graph_id = next(self._graph_ids) if self._make_room_to_capture() else None
            buffers = self._buffers[shape] = StaticBuffers(self.context, self.sessions, self.manifest, shape, dtypes, graph_id)
        buffers.last_use = self._uses
        self._buffers.move_to_end(shape)
        return buffers

    def _make_room_to_capture(self) -> bool:
        """Return True if another shape may be captured, after an idle one has made room if necessary."""
        numbered = sum(buffers.graph_id is not None and not buffers.captured for buffers in self._buffers.values())
        if not any(session.capture_enabled for session in self.sessions.all):
            return False
        if max(session.capture_count for session in self.sessions.all) + numbered >= MAX_CAPTURES:
            return False
        captured = [shape for shape, buffers in self._buffers.items() if buffers.captured]
        if len(captured) + numbered < MAX_GRAPHS:
            return True
        if not captured or self._uses - self._buffers[captured[0]].last_use <= IDLE_USES:
            return False
        self._buffers.pop(captured[0]).release()
        return True

    def release_uncaptured(self, shape: BatchShape) -> None:
        """Free the buffers without a captured graph, and those of ``shape`` with or without one. Let the arenas shrink at the next run."""
        for other in [other for other, buffers in self._buffers.items() if other == shape or not buffers.captured]:
            self._buffers.pop(other).release()
        for session in self.sessions.all:
            session.shrink_arena = True
