"""Spans of wall time, for a host's tracing: what OpenTelemetry's ``start_span(name, start_time=…)`` and ``end(end_time=…)`` take, without needing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A piece of work that has ended."""

    name: str
    """"generate" for a whole call; within it "noise", "step", "decode" and "copy"."""
    start_ns: int
    """Nanoseconds since the epoch."""
    end_ns: int
    attributes: Mapping[str, str | int | float]
    """Of "generate": bundle, device, dtype, batch_size and num_inference_steps; of a step its index, ``step``, from 0."""


OnSpan = Callable[[Span], None]
