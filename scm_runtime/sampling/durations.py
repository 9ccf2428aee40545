"""How long recent calls took, from which it is known beforehand that a call of the same kind is brief."""

from __future__ import annotations

from collections.abc import Hashable

from scm_runtime.sampling.request import Request

BRIEF_S = 0.01  # a signal handler may have to wait that long: shorter than people notice
MAX_KINDS = 64


class CallDurations:
    """Durations of the latest call of each kind: number of samples and evaluations, dynamic sizes, output. Several threads may use it.

    It is assumed that the duration depends on nothing else. A handler may have to wait longer with a graph whose number of iterations depends on a value.
    """

    def __init__(self) -> None:
        self._seconds: dict[Hashable, float] = {}

    def is_brief(self, request: Request) -> bool:
        """Return True if the latest call of this kind took less than ``BRIEF_S``; False if there was none."""
        return self._seconds.get(_kind(request), BRIEF_S) < BRIEF_S

    def note(self, request: Request, seconds: float) -> None:
        """Note the duration of a call that has ended."""
        if len(self._seconds) >= MAX_KINDS:
            self._seconds.clear()
        self._seconds[_kind(request)] = seconds


def _kind(request: Request) -> Hashable:
    call = request.trajectory.call
    return len(call.evaluations), request.output_type, *[values.shape for values in call.conditioning.values()], call.seeds.shape
