"""Small networks with state that complicates tracing: compiled as a whole or in part, or with tables that the first call creates. Factories by name."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SHAPE = (3, 6, 10)
CLASSES = 4


class Network(nn.Module):
    """Adds ``positions(x)`` to the input of the first convolution. Subclasses differ in where they keep the positions."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.enter, self.leave = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)
            self.norm, self.classes = nn.GroupNorm(2, 8), nn.Embedding(CLASSES, 8)

    def positions(self, x: Tensor) -> Tensor:
        return torch.zeros(())

    def forward(self, x: Tensor, level: Tensor, class_labels: Tensor) -> Tensor:
        h = self.norm(self.enter(x + self.positions(x)))
        y: Tensor = self.leave((h + self.classes(class_labels)[:, :, None, None] * level[:, None, None, None]).relu())
        return y


def compiled() -> nn.Module:
    return torch.compile(Network())  # type: ignore[return-value]  # an OptimizedModule


def compiled_layer() -> nn.Module:
    network = Network()
    network.enter = torch.compile(network.enter)  # type: ignore[assignment]  # a common way to compile a layer
    return network


def compiled_in_place() -> nn.Module:
    network = Network()
    network.norm.compile()
    network.compile()
    return network


class Decorated(Network):
    @torch.compile
    def forward(self, x: Tensor, level: Tensor, class_labels: Tensor) -> Tensor:
        return super().forward(x, level, class_labels)


class KeepsAttribute(Network):
    table: Tensor | None = None

    def positions(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(-1, 1, x.shape[-1])
        return self.table


class KeepsInDict(Network):
    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[Any, Tensor] = {}

    def positions(self, x: Tensor) -> Tensor:
        key = (x.shape[-1], x.dtype)
        if key not in self.tables:
            self.tables[key] = torch.linspace(-1, 1, x.shape[-1]).to(x.dtype)
        return self.tables[key]


class RegistersBuffer(Network):
    persistent = False

    def positions(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.linspace(-1, 1, x.shape[-1]), persistent=self.persistent)
        return self.table  # type: ignore[return-value]  # a buffer


class RegistersPersistentBuffer(RegistersBuffer):
    persistent = True


class FillsBuffer(Network):
    table: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", None, persistent=False)

    def positions(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(-1, 1, x.shape[-1])
        return self.table


@functools.cache
def line(n: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(-1, 1, n).to(dtype)


class CachesFunction(Network):
    def positions(self, x: Tensor) -> Tensor:
        return line(x.shape[-1], x.dtype)


class BuffersCachedFunction(Network):
    """Registers a tensor as a buffer that is also in a function's cache."""

    def positions(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table"):
            self.register_buffer("table", line(x.shape[-1], torch.float32), persistent=False)
        return self.table  # type: ignore[return-value]  # a buffer


LINES: dict[int, Tensor] = {}


class KeepsGlobally(Network):
    def positions(self, x: Tensor) -> Tensor:
        if x.shape[-1] not in LINES:
            LINES[x.shape[-1]] = torch.linspace(-1, 1, x.shape[-1])
        return LINES[x.shape[-1]]


class KeepsByBatch(Network):
    """Keeps a table for one batch size, and rebuilds it if the batch size changes."""

    table: Tensor | None = None

    def positions(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) != len(x):
            self.table = torch.linspace(-1, 1, x.shape[-1]).expand(len(x), 1, 1, -1).clone()
        return self.table


class GrowsTable(Network):
    """Keeps a table for the largest batch so far."""

    table: Tensor | None = None

    def positions(self, x: Tensor) -> Tensor:
        n = x.shape[0]  # len(x) would make the batch size static in the trace
        if self.table is None or self.table.shape[0] < n:
            self.table = torch.linspace(-1, 1, x.shape[-1])[None, None, None].repeat(n, 1, 1, 1)
        return self.table[:n]


class Scripted(Network):
    """Has a TorchScript layer, which cannot be copied like other modules."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.leave = torch.jit.script(self.leave)  # type: ignore[assignment]  # callable like a Conv2d


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "compiled": compiled,
    "compiled_layer": compiled_layer,
    "compiled_in_place": compiled_in_place,
    "decorated": Decorated,
    "attribute": KeepsAttribute,
    "dict": KeepsInDict,
    "late_buffer": RegistersBuffer,
    "late_persistent_buffer": RegistersPersistentBuffer,
    "buffer_of_none": FillsBuffer,
    "lru_cache": CachesFunction,
    "buffer_of_lru_cache": BuffersCachedFunction,
    "global_dict": KeepsGlobally,
    "by_batch": KeepsByBatch,
    "grows": GrowsTable,
    "scripted": Scripted,
}

held: dict[str, nn.Module] = {}
"""Networks that ``make`` returns instead of new ones, by name: the test holds a reference to them too."""


def make(kind: str) -> nn.Module:
    return held[kind] if kind in held else NETWORKS[kind]()
