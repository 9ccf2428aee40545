"""The time limit of a call: the argument ``timeout``."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import NamedTuple

from scm_runtime.common.deadlines import call_at
from scm_runtime.common.runs import CancelScope
from scm_runtime.errors import GenerationTimeoutError, InvalidArgumentError


class Deadline(NamedTuple):
    """When a call must be finished."""

    timeout: float
    """Seconds from the beginning of the call."""
    at: float
    """The same as a time of ``time.monotonic``."""

    def remaining(self) -> float:
        """Return the seconds that are left. Raises GenerationTimeoutError if there are none."""
        seconds = self.at - time.monotonic()
        if seconds <= 0:
            raise self.error()
        return seconds

    def error(self) -> GenerationTimeoutError:
        """Return a new error for a call that is not finished in time."""
        return GenerationTimeoutError(f"not finished within timeout={self.timeout:g} seconds. Raise it, or use fewer steps or a smaller batch.")


def read_deadline(timeout: object) -> Deadline | None:
    """Return the deadline of a call that begins now, None for no time limit. Raises InvalidArgumentError.

    A part of a call whose deadline is known is given that instead of seconds.
    """
    if timeout is None or isinstance(timeout, Deadline):
        return timeout
    try:
        seconds = float(timeout) if isinstance(timeout, Real) and not isinstance(timeout, bool) else math.nan
    except OverflowError:
        seconds = math.inf
    if not 0 < seconds < math.inf:
        raise InvalidArgumentError(f"timeout must be a number of seconds above 0, or None for no limit, got {timeout!r}")
    return Deadline(seconds, time.monotonic() + seconds)


@contextmanager
def cancelled_at(deadline: Deadline, scope: CancelScope) -> Iterator[None]:
    """Context manager that cancels a scope if its block lasts until the deadline."""
    timer = call_at(deadline.at, lambda: scope.cancel(deadline.error))
    try:
        yield
    finally:
        timer.cancel()
