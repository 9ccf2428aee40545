"""Explains why torch cannot trace a network: the cause, the line of the user's code, and the remedy."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from unittest.mock import patch

from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from scm_export.user_code import Line, failed_line, running_line

SIZES_LOG = "torch.fx.experimental.symbolic_shapes"
TRACER_LOGS = ("torch.onnx", "torch.export", "torch._dynamo", SIZES_LOG)


@contextmanager
def quiet_tracer() -> Iterator[None]:
    """Context in which torch's tracer prints nothing: neither warnings about optional packages, nor the graph if it fails."""
    logs = [logging.getLogger(name) for name in TRACER_LOGS]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        with patch("torch.export._trace.print", lambda *_args, **_kwargs: None, create=True):
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def explain(error: Exception, name: str) -> str:
    """Return the message for a graph that cannot be traced.

    Args:
        error: what torch raised, with its causes.
        name: of the graph.
    """
    causes = list(_causes(error))
    if data_dependent := next((cause for cause in causes if isinstance(cause, GuardOnDataDependentSymNode)), None):
        return (
            f"the network of {name} cannot be traced: a branch or a Python number depends on the values of a tensor{_at(failed_line(data_dependent))}. "
            "A graph is the same for all values. Compute both alternatives and choose with torch.where, or use a mask."
        )
    cause = causes[-1]
    reason = next(iter(str(cause).strip().splitlines()), "")
    if missing := re.search(r"No ONNX function found for <OpOverload\(op='(.*?)'", reason):
        return f"the network of {name} cannot be translated: torch.onnx has no translation of the operator {missing[1]}. Use other operators in its place."
    return f"torch.onnx cannot translate the network of {name}: {type(cause).__name__}: {reason}{_at(failed_line(cause))}"


def fixed_batch(name: str, batch_size: int, trace: Callable[[], object]) -> str:
    """Return the message for a graph that torch could only trace for one batch size.

    Args:
        name: of the graph.
        batch_size: the size used for tracing.
        trace: traces the module once more, with torch.export. It may fail.
    """
    return (
        f"the batch size of {name} is fixed at {batch_size}, the size used for tracing. The network uses its batch size as a number"
        f"{_at(_line_that_fixes_size(trace))}. That happens in a loop over samples, in len(x), int(x.shape[0]) and float(x.shape[0]), and with a table of this "
        "length that the network keeps. Use x.shape[0] without converting it, operate on the whole batch, or make such a table at every call "
        "(docs/exporting.md#guidance-inside-the-network)."
    )


def _at(line: Line | None) -> str:
    return "" if line is None else f", at {line}\n"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


# ----------------------------------------------------------------------------
# Which line fixes a size: while torch traces, it logs every condition on a size that it assumes.


class _FirstFixedSize(logging.Handler):
    """Keeps the line of the user's code that was running when torch first assumed that an expression of one dynamic size equals a number."""

    line: Line | None = None

    def emit(self, record: logging.LogRecord) -> None:
        condition, is_assumed, _ = record.getMessage().partition("[guard added]")
        if self.line is None and is_assumed and "Eq(" in condition and len(set(re.findall(r"\bs\d+\b", condition))) == 1:
            self.line = running_line()


def _line_that_fixes_size(trace: Callable[[], object]) -> Line | None:
    log, handler = logging.getLogger(SIZES_LOG), _FirstFixedSize()
    with quiet_tracer(), patch.object(log, "propagate", False), patch.object(log, "handlers", [handler]), suppress(Exception):
        log.setLevel(logging.INFO)
        trace()  # fails as before
    return handler.line
