"""Fixed places in a device's memory for batches of one size, the sessions bound to them, and the CUDA graphs captured of those."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle import Manifest
from scm_runtime.cuda import Memory, is_fatal
from scm_runtime.cuda_thread import CAPTURES, CudaContext
from scm_runtime.errors import InferenceError, OutOfMemoryError
from scm_runtime.session import Bound, Region, Session

# ONNX Runtime never gives captured graphs back, nor the memory they work in: so many shapes of batches, and the rest runs without.
MAX_GRAPHS = 8
# Shapes without a graph whose places are kept for the next batch of that shape.
MAX_OTHERS = 8
ALIGNMENT = 256  # bytes: what cudaMalloc gives, and vectorised loads may count on

Field = tuple[type[np.generic], tuple[int, ...]]
Key = tuple[int, tuple[tuple[str, tuple[int, ...]], ...]]
"""N, and the shape of each conditioning input without N."""

_log = logging.getLogger("scm_runtime")


class Block:
    """One piece of memory with several tensors in it, in order, each aligned."""

    def __init__(self, context: CudaContext, fields: Mapping[str, Field]) -> None:
        """Allocate. Raises OutOfMemoryError."""
        self.offsets: dict[str, int] = {}
        end = 0
        for name, (dtype, shape) in fields.items():
            self.offsets[name] = end
            end += -(-np.dtype(dtype).itemsize * prod(shape) // ALIGNMENT) * ALIGNMENT
        self.fields = dict(fields)
        self.memory: Memory = context.gpu.allocate(end)
        self._gpu = context.gpu

    def __getitem__(self, name: str) -> Region:
        """Where a tensor lies."""
        dtype, shape = self.fields[name]
        return Region(self.memory.address + self.offsets[name], dtype, shape)

    def upload(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write tensors that stand together, in one copy."""
        first = min(self.offsets[name] for name in arrays)
        size = max(self.offsets[name] + nbytes(self[name]) for name in arrays) - first
        packed = np.zeros(size, np.uint8)
        for name, array in arrays.items():
            dtype, shape = self.fields[name]
            at = self.offsets[name] - first
            packed[at : at + nbytes(self[name])].view(dtype).reshape(shape)[...] = array
        self._gpu.upload(self.memory.address + first, packed)


def nbytes(region: Region) -> int:
    """What a tensor takes."""
    return np.dtype(region.dtype).itemsize * prod(region.shape)


def rows(region: Region, start: int, length: int) -> Region:
    """A part of a tensor along its first axis."""
    shape = region.shape[1:]
    return Region(region.address + start * np.dtype(region.dtype).itemsize * prod(shape), region.dtype, (length, *shape))


class Graph:
    """An open session, and whether its runs may be captured."""

    def __init__(self, context: CudaContext, session: Session, *, capture: bool) -> None:
        self.context, self.session, self.capture = context, session, capture
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
        self._number = number if graph.capture else None
        self.captured = False
        self._bound = self._bind(self._number)

    def __call__(self) -> None:
        """Put the work on the stream. The first time, with a number, ONNX Runtime runs it three times: twice to warm up, once to capture.

        Raises:
            OutOfMemoryError: memory did not suffice.
            InferenceError: ONNX Runtime failed.
        """
        graph = self._graph
        if graph.shrink and not graph.captured:
            graph.shrink = False
            self._bind(None, {"memory.enable_memory_arena_shrinkage": f"gpu:{graph.context.index}"})()
        elif self._number is None or self.captured:
            self._bound()
        else:
            self._capture()

    def _capture(self) -> None:
        graph = self._graph
        try:
            if not graph.capture:  # another shape failed since
                raise InferenceError("not captured")
            with CAPTURES.alone():
                try:
                    self._bound()
                except InferenceError as error:
                    if not is_fatal(error):
                        graph.context.gpu.end_capture()
                    raise
        except InferenceError as error:
            if is_fatal(error):
                raise
            self._number = None
            self._bound = self._bind(None)
            # What does not fit while it is captured may fit without, and memory is a matter of this shape alone.
            if graph.capture and not isinstance(error, OutOfMemoryError):
                graph.capture = False
                _log.info("'%s' runs without CUDA graphs: %s", graph.session.path.name, error)
            self._bound()
        else:
            self.captured = True
            graph.captured += 1

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


class Slot:
    """Where batches of N samples are computed, for one set of sizes of the conditioning."""

    def __init__(self, context: CudaContext, graphs: Graphed, manifest: Manifest, key: Key, dtypes: Mapping[str, type[np.generic]], number: int | None) -> None:
        """Take the memory of the steps; the decoder's when it is first needed. Raises OutOfMemoryError."""
        n, sizes = key
        self.n, self.number = n, number
        self._context, self._graphs = context, graphs
        state: Field = (np.float32, (n, *manifest.sample.shape))
        self._conditioning = {name: (dtypes[name], (n, *shape)) for name, shape in sizes}
        self.block = block = Block(
            context,
            {
                "t": (np.float32, (n,)),
                "t_next": (np.float32, (n,)),
                "draw": (np.int64, ()),
                "scale": (np.float32, ()),
                "seeds": (np.int64, (n,)),
                **{f"given {name}": field for name, field in self._conditioning.items()},
                "finite": (np.float32, (n,)),
                "noise": state,
                "x": state,
                "x_next": state,
            },
        )
        self.loaded: tuple[int, ...] = ()
        """Whose seeds and conditioning stand here."""
        given = {name: block[f"given {name}"] for name in self._conditioning}
        self.noise = graphs.noise.bind({name: block[name] for name in ("seeds", "draw", "scale")}, block["noise"], number)
        self.step = graphs.step.bind({name: block[name] for name in ("x", "t", "t_next", "noise")} | given, block["x_next"], number)
        flat = block["x_next"]._replace(shape=(n, prod(manifest.sample.shape)))
        self.check = graphs.finite.bind({"x": flat}, block["finite"], number)
        decoded = np.uint8 if manifest.output.kind == "image" else np.float32
        self._decoded: Field = (decoded, (n, *manifest.output.shape))
        self._decoder: tuple[Block, Run] | None = None

    def __getitem__(self, name: str) -> Region:
        """One of its tensors; a conditioning input as ``given NAME``."""
        return self.block[name]

    def decode(self) -> Region:
        """Decode x, and say where the result lies."""
        if self._decoder is None:
            block = Block(self._context, {"decoded": self._decoded})
            self._decoder = block, self._graphs.decode.bind({"x": self.block["x"]}, block["decoded"], self.number)
        block, run = self._decoder
        run()
        return block["decoded"]

    @property
    def captured(self) -> bool:
        """Whether a captured graph works here."""
        runs: Sequence[Run] = (self.noise, self.step, self.check, *((self._decoder[1],) if self._decoder else ()))
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
        numbered = max(graph.captured for graph in self.graphs) + sum(slot.number is not None and not slot.captured for slot in self._slots.values())
        return any(graph.capture for graph in self.graphs) and numbered < MAX_GRAPHS

    def drop_others(self, key: Key | None) -> None:
        """Give the memory of places without a graph back, and that of ``key`` in any case: its graphs are never run again."""
        for other in [other for other, slot in self._slots.items() if other == key or not slot.captured]:
            del self._slots[other]

    def clear(self) -> None:
        """Give all memory back."""
        self._slots.clear()
