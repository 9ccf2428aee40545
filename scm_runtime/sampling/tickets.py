"""Requests of ``submit`` that wait or are worked on, and what becomes of their futures."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from scm_runtime.errors import GeneratorClosedError
from scm_runtime.samples import Samples
from scm_runtime.sampling.loop import Sampler
from scm_runtime.sampling.request import Request

if TYPE_CHECKING:
    from concurrent.futures import Future

_log = logging.getLogger("scm_runtime")


class Ticket:
    """A request in the line, and the future of its samples. It keeps what computes it alive; the line alone does not."""

    def __init__(self, sampler: Sampler, request: Request, future: Future[Samples], leave: Callable[[], None]) -> None:
        """``leave`` is called once, before the future has its result, when nothing will be computed for it any more."""
        self.sampler, self.request, self.future = sampler, request, future
        self.begun = self.settled = False
        self._leave = leave
        self.kind = tuple(sorted((name, values.shape[1:]) for name, values in request.trajectory.call.conditioning.items()))
        """Tickets of one kind can share an evaluation."""

    def __len__(self) -> int:
        return len(self.request.trajectory)

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more, and it has not been told yet."""
        return not self.settled and self.future.cancelled()

    def settle(self, outcome: Samples | BaseException | None) -> None:
        """Hand over what came of it, None if it was cancelled: once, outside the engine's jobs, and with no lock held, for this runs code of the user's."""
        if self.settled:
            return
        if isinstance(outcome, Samples):
            try:
                self.sampler.tell(self.request, outcome)
            except BaseException as error:  # noqa: BLE001 - of the user's on_span: his future shall have it
                outcome = error
        if isinstance(outcome, GeneratorClosedError):
            forget_frames(outcome)  # whoever closes wants memory back, whether the futures are kept or not
        self.settled = True
        for act in (self._leave, lambda: self._tell_future(outcome)):
            try:
                act()
            except BaseException:  # noqa: BLE001 - of a session that cannot be closed, or of a callback of the future: others shall not suffer from it
                _log.exception("A request of submit() has ended, and what follows on it failed.")
        del self.future  # an error knows the frames it came through, and those the ticket: it would keep itself alive, and the engine with it

    def _tell_future(self, outcome: Samples | BaseException | None) -> None:
        if not self.future.set_running_or_notify_cancel() or outcome is None:
            return
        if isinstance(outcome, BaseException):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


def hand_over(outcomes: MutableMapping[Ticket, Any]) -> None:
    """Settle them, and keep none."""
    for ticket in list(outcomes):
        ticket.settle(outcomes.pop(ticket))


def forget_frames(error: BaseException | None) -> None:
    """Drop the tracebacks of an error and its causes: they hold the frames that it came through, and those the engine and its memory."""
    while error is not None:
        error.__traceback__, error = None, error.__cause__ or error.__context__
