"""Fixed places in a device's memory for batches of one size, the sessions bound to them, and the CUDA graphs captured of those."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod

import numpy as np

from scm_runtime.bundle.manifest import Manifest
from scm_runtime.engines.cuda.blocks import Block, Field
from scm_runtime.engines.cuda.capture import Graphed, Run
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.ort.session import Region

# ONNX Runtime never gives captured graphs back, nor the memory they work in: so many shapes of batches, and the rest runs without.
MAX_GRAPHS = 8
# Shapes without a graph whose places are kept for the next batch of that shape.
MAX_OTHERS = 8

Key = tuple[int, tuple[tuple[str, tuple[int, ...]], ...]]
"""N, and the shape of each conditioning input without N."""


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

    def decode(self) -> Region:
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
