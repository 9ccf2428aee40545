"""Continuous batching: requests wait in a line, and one thread takes as many of them a step further at a time as fit into one evaluation.

Time is an input a sample, so requests merge whatever step they are at: one that comes joins at the next evaluation, and one that is done makes room. They
merge if their conditioning has the same names and free sizes. Whoever came first is in every batch, so none waits for ever; of the others those join, in the
order in which they came, that fit. Which company a sample has does not change it.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

from scm_runtime.common import process
from scm_runtime.common.checks import is_int
from scm_runtime.common.runs import closed_error
from scm_runtime.errors import GeneratorClosedError, InferenceError, InvalidArgumentError, OutOfMemoryError
from scm_runtime.samples import Samples
from scm_runtime.sampling.loop import Sampler, directly
from scm_runtime.sampling.request import Request
from scm_runtime.sampling.tickets import Ticket, hand_over

if TYPE_CHECKING:
    from concurrent.futures import Future
    from queue import SimpleQueue

THREAD_NAME = "scm-runtime-batching"
ON_STEP_WAIT_S, POLL_S = 0.1, 0.01  # of whoever closes: for a callback_on_step_end, and how often to look whether there is one

Result = TypeVar("Result")
_log = logging.getLogger("scm_runtime")


class Line:
    """The tickets of one Generator and the thread that works them off. The thread holds nothing else: while none waits, the Generator can be collected."""

    def __init__(self, max_batch_size: int, max_wait: float) -> None:
        """``max_batch_size`` in samples; ``max_wait`` in seconds that the first in the line may wait for company."""
        from queue import SimpleQueue

        self._max_batch_size, self._max_wait = max_batch_size, max_wait
        self._limit = max_batch_size  # lower once memory ran out, until the line is empty
        self._tickets: list[Ticket] = []  # the thread's own, in the order in which they came
        # None wakes the thread. Putting takes no lock of ours, so that the garbage collector may do it wherever it comes in between.
        self._mail: SimpleQueue[Ticket | None] = SimpleQueue()
        self._lock = threading.RLock()  # over the mail and this; re-entered by signal handlers
        self._serving = False  # whether there is a thread that takes from the mail
        self._thread: threading.Thread | None = None  # the last one
        self._called_back = False  # whether it is in a callback_on_step_end, which may wait for whoever closes
        self._closed = False
        self._ended = False

    def put(self, ticket: Ticket) -> None:
        """Let it join, and start the thread if there is none."""
        with self._lock:
            if not self._serving:
                thread = threading.Thread(target=self._serve, name=THREAD_NAME, daemon=True)
                process.stop_at_exit(self)
                thread.start()
                self._thread, self._serving = thread, True  # the thread looks at it under the lock
            self._mail.put(ticket)

    def close(self) -> None:
        """Refuse all tickets; the thread ends when it has told them. Waits for nothing."""
        self._closed = True
        self.end()

    def end(self) -> None:
        """Let the thread end once no ticket waits."""
        self._ended = True
        self._mail.put(None)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the thread's end, ``timeout`` seconds at most; not within the thread."""
        if (thread := self._thread) is not None and not self.is_current:
            thread.join(timeout)

    @property
    def is_current(self) -> bool:
        """Whether it is the line's thread that asks."""
        return self._thread is threading.current_thread()

    def join_unless_called_back(self) -> None:
        """After ``close``: wait for the thread's end, but hardly for a ``callback_on_step_end``, and not for ever for other code of the user's."""
        if (thread := self._thread) is None or self.is_current:
            return
        start = time.monotonic()
        while thread.is_alive() and time.monotonic() - start < (ON_STEP_WAIT_S if self._called_back else process.CALLBACK_WAIT_S):
            thread.join(POLL_S)

    # -- The thread ------------------------------------------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while self._receive():
                self._round()
        except BaseException as error:  # noqa: BLE001 - a fault of this module: nobody shall wait for ever
            _log.exception("The thread that works off submit() died; the next submit() starts another.")
            with self._lock:
                self._serving = False
                self._take_mail()
                tickets, self._tickets = self._tickets, []
            said = f"the thread that computes submitted requests failed, {type(error).__name__}: {error}. Submit this one again."
            hand_over({ticket: InferenceError(said) for ticket in tickets})

    def _receive(self) -> bool:
        """Wait until there is something to compute; False if the thread is to end."""
        while True:
            self._take_mail()
            if self._closed:
                hand_over({ticket: _closed_error(ticket) for ticket in self._tickets})
            hand_over({ticket: None for ticket in self._tickets if ticket.cancelled})
            self._forget_settled()
            if self._tickets:
                patience = self._patience()
                if patience <= 0:
                    return True
                self._wait(patience)
                continue
            self._limit = self._max_batch_size
            if self._ended:
                with self._lock:
                    if self._mail.empty():
                        self._serving = False
                        return False
            else:
                self._wait(None)

    def _take_mail(self) -> None:
        while not self._mail.empty():  # this thread alone takes from it
            self._wait(0)

    def _wait(self, timeout: float | None) -> None:
        """For one letter. A method of its own, so that the thread keeps no ticket while it waits."""
        from queue import Empty

        try:
            ticket = self._mail.get(timeout=timeout)
        except Empty:
            return
        if ticket is not None:
            self._tickets.append(ticket)

    def _patience(self) -> float:
        """Seconds that the first may still wait for company: none if some have begun, a batch is full, or nobody else can come."""
        first = self._tickets[0]
        company = sum(len(ticket) for ticket in self._tickets if ticket.kind == first.kind)
        if self._ended or company >= self._limit or any(ticket.begun for ticket in self._tickets):
            return 0.0
        return first.request.start + self._max_wait - time.perf_counter()

    def _forget_settled(self) -> None:
        self._tickets = [ticket for ticket in self._tickets if not ticket.settled]

    def _round(self) -> None:
        """One step for one batch."""
        batch = choose(self._tickets, self._limit)
        sampler = batch[0].sampler
        silent = [ticket for ticket in batch if ticket.request.on_step is None]
        talking = [ticket for ticket in batch if ticket.request.on_step is not None]
        outcomes: dict[Ticket, Samples | BaseException] = {}

        def job() -> None:
            self._together(_advance, batch, outcomes)
            for ticket in silent:
                _after_step(ticket, directly, outcomes)
            self._finish(silent, outcomes)

        sampler.engine.run(job)
        hand_over(outcomes)
        for ticket in talking:
            self._called_back = True
            _after_step(ticket, sampler.engine.run, outcomes)
            self._called_back = False
        if any(_ready(ticket, outcomes) for ticket in talking):
            sampler.engine.run(lambda: self._finish(talking, outcomes))
        hand_over(outcomes)
        self._forget_settled()

    def _finish(self, tickets: Sequence[Ticket], outcomes: dict[Ticket, Samples | BaseException]) -> None:
        def finish(ready: Sequence[Ticket]) -> None:
            outcomes.update(zip(ready, ready[0].sampler.finish([ticket.request for ticket in ready]), strict=True))

        self._together(finish, [ticket for ticket in tickets if _ready(ticket, outcomes)], outcomes)

    def _together(self, work: Callable[[Sequence[Ticket]], None], tickets: Sequence[Ticket], outcomes: dict[Ticket, Samples | BaseException]) -> None:
        """Do work for all at once. Where it fails, do it in halves if memory ran out, else one by one, so that only that fails which fails alone."""
        if not tickets:
            return
        try:
            work(tickets)
        except BaseException as error:  # noqa: BLE001 - whose it is shows when each is alone, and his future shall have it
            if len(tickets) == 1:
                outcomes[tickets[0]] = error
                return
            if isinstance(error, GeneratorClosedError):
                outcomes.update((ticket, _closed_error(ticket, error.__cause__)) for ticket in tickets)
                return
            size = 1
            if isinstance(error, OutOfMemoryError):
                size, samples = len(tickets) // 2, sum(map(len, tickets))
                self._limit = max(1, samples // 2)
                _log.warning("Memory ran out with %d samples in one batch: going on with at most %d, until nothing waits.", samples, self._limit)
        else:
            return
        for start in range(0, len(tickets), size):
            self._together(work, tickets[start : start + size], outcomes)


class Batcher:
    """The line of one Generator. Its thread starts with the first request, and ends when the line is closed, or when the Generator is collected."""

    def __init__(self, max_batch_size: int, max_wait: float) -> None:
        """See Line."""
        self._line = Line(max_batch_size, max_wait)
        weakref.finalize(self, self._line.end).atexit = False

    def submit(self, sampler: Sampler, request: Request, leave: Callable[[], None]) -> Future[Samples]:
        """Put a request into the line; ``leave`` is called when it needs the sampler no more."""
        from concurrent.futures import Future

        future: Future[Samples] = Future()
        self._line.put(Ticket(sampler, request, future, leave))
        return future

    def finish(self) -> None:
        """Work off the line, and wait for that unless it is the thread of the line that calls."""
        self._line.end()
        self._line.join()

    def close(self) -> None:
        """See Line."""
        self._line.close()

    def join(self) -> None:
        """See Line.join_unless_called_back."""
        self._line.join_unless_called_back()

    @property
    def is_current(self) -> bool:
        """Whether it is the line's thread that asks: within a callback."""
        return self._line.is_current


def check_batching(max_batch_size: object, max_wait_ms: object) -> tuple[int, float]:
    """The two arguments of a Generator, the second in seconds; raises InvalidArgumentError."""
    longest = 3_600_000
    if not is_int(max_batch_size) or cast(int, max_batch_size) < 1:
        raise InvalidArgumentError(f"max_batch_size must be an integer of at least 1, got {max_batch_size!r}")
    if isinstance(max_wait_ms, bool) or not isinstance(max_wait_ms, int | float) or not 0 <= max_wait_ms <= longest:
        raise InvalidArgumentError(f"max_wait_ms must be a number of milliseconds from 0 to {longest}, got {max_wait_ms!r}")
    return int(cast(int, max_batch_size)), max_wait_ms / 1e3


def choose(tickets: Sequence[Ticket], limit: int) -> list[Ticket]:
    """The next batch: the first ticket, however large, and those behind it of its kind that fit, ``limit`` samples in all."""
    batch, samples = [tickets[0]], len(tickets[0])
    for ticket in tickets[1:]:
        if ticket.kind == tickets[0].kind and samples + len(ticket) <= limit:
            batch.append(ticket)
            samples += len(ticket)
    return batch


def _advance(tickets: Sequence[Ticket]) -> None:
    sampler = tickets[0].sampler
    for ticket in tickets:
        if not ticket.begun:
            sampler.begin(ticket.request)
            ticket.begun = True
    sampler.advance([ticket.request for ticket in tickets])


def _after_step(ticket: Ticket, run: Callable[[Callable[[], Result]], Result], outcomes: dict[Ticket, Samples | BaseException]) -> None:
    if ticket in outcomes or ticket.settled or ticket.cancelled:
        return
    try:
        ticket.sampler.after_step(ticket.request, run)
    except BaseException as error:  # noqa: BLE001 - of the user's callback: his future shall have it
        outcomes[ticket] = error


def _ready(ticket: Ticket, outcomes: dict[Ticket, Samples | BaseException]) -> bool:
    return ticket.request.trajectory.done and not ticket.settled and ticket not in outcomes and not ticket.cancelled


def _closed_error(ticket: Ticket, cause: BaseException | None = None) -> GeneratorClosedError:
    """Of a ticket whose Generator was closed: a new one each, for raising an error again makes its traceback longer."""
    error = closed_error("while this call ran" if ticket.begun else "before this request's turn came")
    error.__cause__ = cause
    return error
