"""Fixed places in a device's memory for batches of one size, the sessions bound to them, and the CUDA graphs captured of those."""

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
from scm_runtime.ort.session import Region

# ONNX Runtime never gives captured graphs back, nor the memory they work in: so many shapes of batches, and the rest runs without.
MAX_GRAPHS = 8
# Shapes without a graph whose places are kept for the next batch of that shape.
MAX_UNCAPTURED = 8

BatchShape = tuple[int, tuple[tuple[str, tuple[int, ...]], ...]]
"""N, and the shape of each conditioning input without N."""


class StaticBuffers:
    """Where batches of N samples are computed, for one set of sizes of the conditioning."""

    def __init__(
        self,
        context: CudaContext,
        sessions: EngineSessions,
        manifest: Manifest,
        shape: BatchShape,
        dtypes: Mapping[str, type[np.generic]],
        graph_id: int | None,
    ) -> None:
        """Take the memory of the steps; the decoder's when it is first needed. Raises OutOfMemoryError."""
        n, sizes = shape
        self.n, self.graph_id = n, graph_id
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
                **{f"conditioning {name}": field for name, field in conditioning.items()},
                "finite": (np.float32, (n,)),
                "noise": state,
                "x": state,
                "x_next": state,
                **({} if sessions.combine is None else {"base": state, "weights": (np.float32, (n, 3))}),
            },
        )
        self.loaded: tuple[int, ...] = ()
        """Whose seeds and conditioning stand here."""
        at = block.tensor
        given = {name: at(f"conditioning {name}") for name in conditioning}
        self.noise = sessions.noise.bind({name: at(name) for name in ("seeds", "draw", "scale")}, at("noise"), graph_id)
        self.step = sessions.step.bind({name: at(name) for name in ("x", "t", "t_next", "noise")} | given, at("x_next"), graph_id)
        flat = at("x_next")._replace(shape=(n, prod(manifest.sample.shape)))
        self.check = sessions.finite.bind({"x": flat}, at("finite"), graph_id)
        self._combine: BoundRun | None = None
        if sessions.combine is not None:
            summands = {"x": at("x"), "base": at("base"), "result": at("noise"), "weights": at("weights")}
            self._combine = sessions.combine.bind(summands, at("x_next"), graph_id)
        decoded = np.uint8 if manifest.output.kind == "image" else np.float32
        self._decoded: TensorSpec = (decoded, (n, *manifest.output.shape))
        self._decoder: tuple[TensorBlock, BoundRun] | None = None

    def combine(self) -> None:
        """Put base, x and what stands in the noise's place together, to x_next."""
        assert self._combine is not None
        self._combine()

    def decode(self) -> Region:
        """Decode x, and say where the result lies."""
        if self._decoder is None:
            block = TensorBlock(self._context, {"decoded": self._decoded})
            self._decoder = block, self._sessions.decode.bind({"x": self.block.tensor("x")}, block.tensor("decoded"), self.graph_id)
        block, run = self._decoder
        run()
        return block.tensor("decoded")

    @property
    def captured(self) -> bool:
        """Whether a captured graph works here."""
        optional = (self._combine, self._decoder and self._decoder[1])
        runs: Sequence[BoundRun] = (self.noise, self.step, self.check, *(run for run in optional if run))
        return any(run.captured for run in runs)


@dataclass
class StaticBufferCache:
    """The places in use, the least recently used first."""

    context: CudaContext
    sessions: EngineSessions
    manifest: Manifest

    def __post_init__(self) -> None:
        self._buffers: OrderedDict[BatchShape, StaticBuffers] = OrderedDict()
        self._graph_ids = count(1)  # never used twice: ONNX Runtime counts a graph ID's warm-up runs, whatever their shape

    def get(self, shape: BatchShape, dtypes: Mapping[str, type[np.generic]]) -> StaticBuffers:
        """The place for a batch. Raises OutOfMemoryError."""
        buffers = self._buffers.get(shape)
        if buffers is None:
            others = [other for other, kept in self._buffers.items() if not kept.captured]
            if len(others) >= MAX_UNCAPTURED:
                del self._buffers[others[0]]
            graph_id = next(self._graph_ids) if self._may_capture() else None
            buffers = self._buffers[shape] = StaticBuffers(self.context, self.sessions, self.manifest, shape, dtypes, graph_id)
        self._buffers.move_to_end(shape)
        return buffers

    def _may_capture(self) -> bool:
        numbered = max(session.capture_count for session in self.sessions.all) + sum(
            buffers.graph_id is not None and not buffers.captured for buffers in self._buffers.values()
        )
        return any(session.capture_enabled for session in self.sessions.all) and numbered < MAX_GRAPHS

    def release_uncaptured(self, shape: BatchShape) -> None:
        """Free the places without a graph, and that of ``key`` in any case: its graphs are never run again. Let the arenas shrink."""
        for other in [other for other, buffers in self._buffers.items() if other == shape or not buffers.captured]:
            del self._buffers[other]
        for session in self.sessions.all:
            session.shrink_arena = True
