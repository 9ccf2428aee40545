"""A request in the scheduler's queue, and how its future gets its result."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from scm_runtime.common.deadlines import Timer
from scm_runtime.common.log import log
from scm_runtime.errors import GeneratorClosedError
from scm_runtime.samples import Samples
from scm_runtime.sampling.caller import current_caller
from scm_runtime.sampling.loop import SamplingLoop
from scm_runtime.sampling.request import Request

if TYPE_CHECKING:
    from concurrent.futures import Future


BatchKey = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of the conditioning. Requests with equal keys can share an evaluation."""


class RequestStatus(Enum):
    """How far a queued request is."""

    WAITING = auto()
    """It has been in no batch."""
    RUNNING = auto()
    """It is in the present batch, or was in an earlier one."""
    FINISHED = auto()
    """Nothing more is computed for it, and its future is done."""


class QueuedRequest:
    """A request of ``submit`` with its future. It keeps the sampling loop alive; the scheduler's thread alone does not."""

    def __init__(self, loop: SamplingLoop, request: Request, future: Future[Samples], release: Callable[[], None]) -> None:
        """Queue a request.

        Args:
            loop: computes the samples.
            request: the call's checked arguments.
            future: receives the samples or an error.
            release: called once, when nothing more is computed for the request and before the future has its result.
        """
        self.loop, self.request = loop, request
        self._future = [future]  # popped once: popping is atomic between threads
        self.status = RequestStatus.WAITING
        self.started = False
        """True if it has a state."""
        self.abandoned = False
        """True if nobody waits for it any more: its future was cancelled, or its deadline has passed."""
        self.timer: Timer | None = None
        """Ends the request at its deadline."""
        self.caller = current_caller()
        self.order = (0, 0)
        """Its turn, and its number in order of arrival. The queue sets both."""
        self.batch_key: BatchKey = tuple(sorted((name, values.shape[1:]) for name, values in request.trajectory.call.conditioning.items()))
        self._release = release

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.request.trajectory)

    @property
    def finished(self) -> bool:
        """True if the future has been resolved."""
        return self.status is RequestStatus.FINISHED

    def resolve(self, outcome: Samples | BaseException | None) -> None:
        """Finish the request: set the future's result or error, or nothing if it was cancelled.

        Call it outside the engine's jobs and without holding a lock, because it runs code of the user: ``on_span`` and the future's callbacks.
        """
        if self.finished:
            return
        if isinstance(outcome, Samples):
            try:
                self.loop.emit_spans(self.request, outcome)
            except BaseException as error:  # noqa: BLE001 - the user's on_span raised: the future gets the error
                outcome = error
        if isinstance(outcome, GeneratorClosedError):
            drop_tracebacks(outcome)  # closing frees memory, even if the futures are kept
        self.status = RequestStatus.FINISHED
        if self.timer is not None:
            self.timer.cancel()
        for act in (self._release, lambda: self._set_future(outcome)):
            try:
                act()
            except BaseException:  # noqa: BLE001 - closing a session or a callback of the future failed: other requests go on
                log.exception("A request of submit() has finished, and its cleanup or a callback of its future failed.")

    def take_future(self) -> Future[Samples] | None:
        """Return the future to the one that sets its result, and None to all later callers.

        The request does not keep the future: a traceback's frames refer to the request, so the future would keep itself and the engine alive.
        """
        try:
            return self._future.pop()
        except IndexError:
            return None

    def _set_future(self, outcome: Samples | BaseException | None) -> None:
        if (future := self.take_future()) is None or not future.set_running_or_notify_cancel() or outcome is None:
            return
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def resolve_all(outcomes: MutableMapping[QueuedRequest, Any]) -> None:
    """Resolve requests with their outcomes, and remove them from the mapping."""
    for queued in list(outcomes):
        queued.resolve(outcomes.pop(queued))


def drop_tracebacks(error: BaseException | None) -> None:
    """Drop the tracebacks of an error and its causes: their frames hold the engine and its memory."""
    while error is not None:
        error.__traceback__, error = None, error.__cause__ or error.__context__
