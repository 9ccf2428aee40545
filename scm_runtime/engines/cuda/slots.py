"""Fixed places in a device's memory for batches of one size, the sessions bound to them, and the CUDA graphs captured of those."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from math import prod
from typing import Any, NamedTuple

import numpy as np

from scm_runtime.bundle.manifest import Manifest
from scm_runtime.engines.cuda.gpu import Memory, is_fatal
from scm_runtime.engines.cuda.thread import CAPTURES, CudaContext
from scm_runtime.errors import GeneratorClosedError, InferenceError, OutOfMemoryError
from scm_runtime.ort.session import BoundSession, DeviceTensor, Session

# ONNX Runtime never gives captured graphs back, nor the memory they work in: so many shapes of batches, and the rest runs without.
MAX_GRAPHS = 8
# Shapes without a graph whose places are kept for the next batch of that shape.
MAX_OTHERS = 8
# Before a capture, which must not allocate. ONNX Runtime runs twice on its own account, after which its arena may still have to grow.
PREPARATIONS = 2
ALIGNMENT = 256  # bytes: what cudaMalloc gives, and vectorised loads may count on

Field = tuple[type[np.generic], tuple[int, ...]]
Key = tuple[int, tuple[tuple[str, tuple[int, ...]], ...]]
"""N, and the shape of each conditioning input without N."""

_log = logging.getLogger("scm_runtime")


class Layout:
    """Tensors in one piece of memory, in order, each aligned."""

    def __init__(self, fields: tuple[tuple[str, Field], ...]) -> None:
        self.fields = dict(fields)
        self.offsets: dict[str, int] = {}
        self.sizes = {name: np.dtype(dtype).itemsize * prod(shape) for name, (dtype, shape) in fields}
        """In bytes."""
        self.end = 0
        for name, size in self.sizes.items():
            self.offsets[name] = self.end
            self.end += -(-size // ALIGNMENT) * ALIGNMENT
        self._records: dict[tuple[str, ...], tuple[int, np.dtype[Any]]] = {}

    def record(self, names: tuple[str, ...]) -> tuple[int, np.dtype[Any]]:
        """Some of the tensors, that stand together, as NumPy writes them at once: where the first one begins, and the dtype of all."""
        if names not in self._records:
            first, end = min(self.offsets[name] for name in names), max(self.offsets[name] + self.sizes[name] for name in names)
            offsets = [self.offsets[name] - first for name in names]
            dtype = np.dtype({"names": names, "formats": [self.fields[name] for name in names], "offsets": offsets, "itemsize": end - first})
            self._records[names] = first, dtype
        return self._records[names]


_layout = lru_cache(64)(Layout)


class Block:
    """Memory with several tensors in it."""

    def __init__(self, context: CudaContext, fields: Mapping[str, Field]) -> None:
        """Allocate. Raises OutOfMemoryError."""
        self._layout, self._gpu = _layout(tuple(fields.items())), context.gpu
        self.sizes = self._layout.sizes
        self._memory: Memory = self._gpu.allocate(self._layout.end)

    def address(self, name: str) -> int:
        """Where a tensor lies."""
        return self._memory.address + self._layout.offsets[name]

    def region(self, name: str) -> DeviceTensor:
        """A tensor, for a session to be bound to."""
        return DeviceTensor(self.address(name), *self._layout.fields[name])

    def upload(self, arrays: Mapping[str, Any]) -> None:
        """Write tensors that stand together, in one copy."""
        first, dtype = self._layout.record(tuple(arrays))
        packed = np.zeros((), dtype)
        for name, array in arrays.items():
            packed[name] = array
        self._gpu.upload(self._memory.address + first, packed)


class Graph:
    """An open session, whether all of it runs on the device, and whether its runs may be captured."""

    def __init__(self, context: CudaContext, session: Session, *, resident: bool, capture: bool) -> None:
        self.context, self.session, self.resident, self.capture = context, session, resident, resident and capture
        self.captured = 0
        self.shrink = False
        """Whether the next run is to give back what the arena has spare."""

    def bind(self, inputs: Mapping[str, DeviceTensor], output: DeviceTensor, number: int | None) -> Run:
        """A run at these addresses, captured under this number unless it is None."""
        return Run(self, inputs, output, number)


class Run:
    """A session bound to fixed addresses."""

    def __init__(self, graph: Graph, inputs: Mapping[str, DeviceTensor], output: DeviceTensor, number: int | None) -> None:
        self._graph, self._inputs, self._output = graph, dict(inputs), output
        self._number = number
        self._bound: BoundSession | None = None
        self._captured: BoundSession | None = None

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

    def _bind(self, number: int | None, options: Mapping[str, str] | None = None) -> BoundSession:
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


class Slot:
    """Where batches of N samples are computed, for one set of sizes of the conditioning."""

    def __init__(self, context: CudaContext, graphs: Graphed, manifest: Manifest, key: Key, dtypes: Mapping[str, type[np.generic]], number: int | None) -> None:
        """Take the memory of the steps; the decoder's when it is first needed. Raises OutOfMemoryError."""
        n, sizes = key
        self.n, self.number = n, number
        self._context, self._graphs = context, graphs
        state: Field = (np.float32, (n, *manifest.sample.shape))
        conditioning: dict[str, Field] = {name: (dtypes[name], (n, *shape)) for name, shape in sizes}
        self.block = block = Block(
            context,
            {
                "t": (np.float32, (n,)),
                "t_next": (np.float32, (n,)),
                "draw": (np.int64, ()),
                "scale": (np.float32, ()),
                "seeds": (np.int64, (n,)),
                **{f"given {name}": field for name, field in conditioning.items()},
                "finite": (np.float32, (n,)),
                "noise": state,
                "x": state,
                "x_next": state,
                **({} if graphs.combine is None else {"base": state, "weights": (np.float32, (n, 3))}),
            },
        )
        self.loaded: tuple[int, ...] = ()
        """Whose seeds and conditioning stand here."""
        at = block.region
        given = {name: at(f"given {name}") for name in conditioning}
        self.noise = graphs.noise.bind({name: at(name) for name in ("seeds", "draw", "scale")}, at("noise"), number)
        self.step = graphs.step.bind({name: at(name) for name in ("x", "t", "t_next", "noise")} | given, at("x_next"), number)
        flat = at("x_next")._replace(shape=(n, prod(manifest.sample.shape)))
        self.check = graphs.finite.bind({"x": flat}, at("finite"), number)
        self._combine: Run | None = None
        if graphs.combine is not None:
            summands = {"x": at("x"), "base": at("base"), "result": at("noise"), "weights": at("weights")}
            self._combine = graphs.combine.bind(summands, at("x_next"), number)
        decoded = np.uint8 if manifest.output.kind == "image" else np.float32
        self._decoded: Field = (decoded, (n, *manifest.output.shape))
        self._decoder: tuple[Block, Run] | None = None

    def combine(self) -> None:
        """Put base, x and what stands in the noise's place together, to x_next."""
        assert self._combine is not None
        self._combine()

    def decode(self) -> DeviceTensor:
        """Decode x, and say where the result lies."""
        if self._decoder is None:
            block = Block(self._context, {"decoded": self._decoded})
            self._decoder = block, self._graphs.decode.bind({"x": self.block.region("x")}, block.region("decoded"), self.number)
        block, run = self._decoder
        run()
        return block.region("decoded")

    @property
    def captured(self) -> bool:
        """Whether a captured graph works here."""
        optional = (self._combine, self._decoder and self._decoder[1])
        runs: Sequence[Run] = (self.noise, self.step, self.check, *(run for run in optional if run))
        return any(run.captured for run in runs)


@dataclass
class Slots:
    """The places in use, the least recently used first."""

    context: CudaContext
    graphs: Graphed
    manifest: Manifest

    def __post_init__(self) -> None:
        self._slots: OrderedDict[Key, Slot] = OrderedDict()
        self._numbers = count(1)  # never used twice: ONNX Runtime counts a number's warm-up runs, whatever their shape

    def get(self, key: Key, dtypes: Mapping[str, type[np.generic]]) -> Slot:
        """The place for a batch. Raises OutOfMemoryError."""
        slot = self._slots.get(key)
        if slot is None:
            others = [other for other, kept in self._slots.items() if not kept.captured]
            if len(others) >= MAX_OTHERS:
                del self._slots[others[0]]
            number = next(self._numbers) if self._may_capture() else None
            slot = self._slots[key] = Slot(self.context, self.graphs, self.manifest, key, dtypes, number)
        self._slots.move_to_end(key)
        return slot

    def _may_capture(self) -> bool:
        numbered = max(graph.captured for graph in self.graphs.all) + sum(slot.number is not None and not slot.captured for slot in self._slots.values())
        return any(graph.capture for graph in self.graphs.all) and numbered < MAX_GRAPHS

    def give_back(self, key: Key) -> None:
        """Free the places without a graph, and that of ``key`` in any case: its graphs are never run again. Let the arenas shrink."""
        for other in [other for other, slot in self._slots.items() if other == key or not slot.captured]:
            del self._slots[other]
        for graph in self.graphs.all:
            graph.shrink = True
