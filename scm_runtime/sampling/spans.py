"""The spans of a call's parts, for the tracing of a host application."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scm_runtime.samples import Span
from scm_runtime.sampling.request import Request


def spans_of(request: Request, elapsed: Callable[[Any, Any], float]) -> list[Span]:
    """Return a span for each part of a finished request. ``elapsed`` returns the seconds between two timestamps of its engine."""
    spans, steps = [], 0
    zero = request.trajectory.parts[0].start
    for part in request.trajectory.parts:
        attributes: dict[str, str | int | float] = {}
        if part.name == "step":
            attributes, steps = {"step": steps}, steps + 1
        start, end = (request.started_ns + round(elapsed(zero, timestamp) * 1e9) for timestamp in (part.start, part.end))
        spans.append(Span(part.name, start, end, attributes))
    return spans
