"""Continuous batching of the requests of ``submit``: one thread evaluates as many of them per step as fit into a batch.

The time is an input per sample, so requests share an evaluation whatever step they are at: a new request joins at the next evaluation, and a finished one
makes room. On a GPU, requests that begin together and take few evaluations are computed to their end in one piece; others join after that. Requests share an
evaluation if their conditioning has the same names and dynamic sizes. The request whose turn it is, see ``RequestQueue``, is in every batch, so none
starves; those whose turns come later join if they fit. Samples do not depend on the batch that they are computed in.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from scm_runtime.common import process
from scm_runtime.common.checks import is_int
from scm_runtime.common.deadlines import call_at
from scm_runtime.common.log import log
from scm_runtime.common.runs import CancelScope, closed_error
from scm_runtime.errors import GenerationCancelledError, GeneratorClosedError, InferenceError, InvalidArgumentError, OutOfMemoryError, QueueFullError
from scm_runtime.samples import Samples
from scm_runtime.sampling.loop import SamplingLoop, run_inline
from scm_runtime.sampling.queued_request import QueuedRequest, resolve_all
from scm_runtime.sampling.request import Request
from scm_runtime.sampling.request_queue import RequestQueue

Result = TypeVar("Result")

if TYPE_CHECKING:
    from concurrent.futures import Future
    from queue import SimpleQueue

THREAD_NAME = "scm-runtime-batching"
CALLBACK_JOIN_S, POLL_S = 0.1, 0.01  # on close: how long to wait for a running callback_on_step_end, and how often to look

Outcomes = dict[QueuedRequest, Samples | BaseException]


class BatchScheduler:
    """The queue of one Generator and the thread that works on it.

    The thread starts with the first request. It refers to the scheduler and to unfinished requests, but not to the Generator: while nothing is queued, the
    Generator can be garbage-collected, and its finalizer calls ``stop_when_idle``.
    """

    def __init__(self, max_batch_size: int, max_wait: float, max_queue: int | None = None) -> None:
        """Make an empty queue.

        Args:
            max_batch_size: samples per batch; a larger request runs alone.
            max_wait: seconds that a request may wait for others to share its first batch.
            max_queue: maximum number of unfinished requests; None for no limit.
        """
        from queue import SimpleQueue

        self._max_batch_size, self._max_wait, self._max_queue = max_batch_size, max_wait, max_queue
        self._limit = max_batch_size  # lowered when memory runs out, until the queue is empty
        self._queue = RequestQueue()  # only the thread uses it
        # New requests; references to abandoned ones; None wakes the thread. SimpleQueue.put is reentrant: the garbage collector may call it at any point.
        self._inbox: SimpleQueue[QueuedRequest | weakref.ref[QueuedRequest] | None] = SimpleQueue()
        self._abandoned: list[QueuedRequest] = []  # only the thread uses it
        self._computing: tuple[CancelScope, Sequence[QueuedRequest]] | None = None  # the runs in flight, and the requests that they are for
        self._lock = threading.RLock()  # guards the inbox, _serving and _unfinished; signal handlers may enter it again
        self._unfinished = 0  # requests, from add_request until they are resolved
        self._serving = False  # True while a thread takes requests from the inbox
        self._thread: threading.Thread | None = None  # the latest one
        self._in_callback = False  # True while the thread is in a callback_on_step_end, which may wait for the thread that closes
        self._closed = False
        self._stopping = False

    def add_request(self, loop: SamplingLoop, request: Request, release: Callable[[], None]) -> Future[Samples]:
        """Queue a request, and start the thread if there is none.

        Args:
            loop: computes the request.
            request: the call's checked arguments.
            release: called once, when the request no longer needs the loop.

        Returns:
            The future of its samples.

        Raises:
            QueueFullError: ``max_queue`` requests are not finished.
            InferenceError: the system has no more threads.
        """
        from concurrent.futures import Future

        def release_request() -> None:
            with self._lock:
                self._unfinished -= 1
            release()

        future: Future[Samples] = Future()
        queued = QueuedRequest(loop, request, future, release_request)
        abandon = _weak_method(self._abandon, queued)
        future.add_done_callback(lambda done: abandon() if done.cancelled() else None)
        with self._lock:
            if self._max_queue is not None and self._unfinished >= self._max_queue:
                raise QueueFullError(f"max_queue={self._max_queue} requests are not finished: submit this one again later, or raise max_queue")
            if not self._serving:
                thread = threading.Thread(target=self._serve, name=THREAD_NAME, daemon=True)
                process.stop_at_exit(self)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise InferenceError(f"cannot start the thread that computes submitted requests: {error}. Raise the limit of threads, or call.") from error
                self._thread, self._serving = thread, True  # the thread reads both under the lock
            if request.deadline is not None:
                queued.timer = call_at(request.deadline.at, _weak_method(self._expire, queued))
            self._unfinished += 1
            self._inbox.put(queued)
        return future

    def _abandon(self, queued: QueuedRequest) -> None:
        """Compute nothing more for a request. Ends the runs in flight if they are for no other. Any thread and the garbage collector may call it."""
        queued.abandoned = True  # before the runs are looked at: a batch that begins meanwhile sees it
        if (computing := self._computing) is not None:
            _cancel_if_abandoned(*computing)
        self._inbox.put(weakref.ref(queued))

    def _expire(self, queued: QueuedRequest) -> None:
        """End a request at its deadline: set the error of its future, and abandon it."""
        assert queued.request.deadline is not None
        if (future := queued.take_future()) is not None:
            with self._lock:  # add_request has put the request into the inbox when it releases the lock
                self._abandon(queued)
            if future.set_running_or_notify_cancel():
                future.set_exception(queued.request.deadline.error())

    def close(self) -> None:
        """Refuse all requests, and let the thread end once it has resolved their futures. Returns at once."""
        self._closed = True
        self.stop_when_idle()

    def stop_when_idle(self) -> None:
        """Let the thread end once no request is left. Returns at once."""
        self._stopping = True
        self._inbox.put(None)

    def finish(self) -> None:
        """Work on all requests, and wait until they are finished; return at once on the scheduler's own thread."""
        self.stop_when_idle()
        self.join()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread ends, for at most ``timeout`` seconds; return at once on that thread."""
        if (thread := self._thread) is not None and not self.is_current_thread:
            thread.join(timeout)

    def join_after_close(self) -> None:
        """Wait until the thread ends, but not long for code of the user: 0.1 s for a ``callback_on_step_end``, 5 s for other code."""
        if (thread := self._thread) is None or self.is_current_thread:
            return
        start = time.monotonic()
        while thread.is_alive() and time.monotonic() - start < (CALLBACK_JOIN_S if self._in_callback else process.CALLBACK_WAIT_S):
            thread.join(POLL_S)

    @property
    def is_current_thread(self) -> bool:
        """True if the caller runs on the scheduler's thread, that is, in a callback."""
        return self._thread is threading.current_thread()

    # -- The thread ------------------------------------------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while self._wait_for_work():
                self._run_step(self._queue.schedule(self._limit))
        except BaseException as error:  # noqa: BLE001 - a bug in this module: no caller may wait forever
            log.exception("The thread that computes requests of submit() died; the next submit() starts another.")
            with self._lock:
                self._serving = False
                self._receive_all()
                requests = list(self._queue)
                self._queue.clear()
            message = f"the thread that computes submitted requests failed, {type(error).__name__}: {error}. Submit this one again."
            resolve_all({queued: InferenceError(message) for queued in requests})

    def _wait_for_work(self) -> bool:
        """Wait until there is something to compute. Returns False if the thread is to end."""
        while True:
            self._receive_all()
            self._resolve_abandoned()
            if self._closed:
                resolve_all({queued: _closed_error(queued) for queued in self._queue})
                self._queue.clear()
            if (first := self._queue.first()) is not None:
                remaining = self._remaining_wait(first)
                del first
                if remaining <= 0:
                    return True
                self._receive(remaining)
                continue
            self._limit = self._max_batch_size
            if self._stopping:
                with self._lock:
                    if self._inbox.empty():
                        self._serving = False
                        return False
            else:
                self._receive(None)

    def _receive_all(self) -> None:
        while not self._inbox.empty():  # only this thread takes from it
            self._receive(0)

    def _receive(self, timeout: float | None) -> None:
        """Wait for one item of the inbox. In a method of its own, so that the waiting thread's frame refers to no request."""
        from queue import Empty

        try:
            received = self._inbox.get(timeout=timeout)
        except Empty:
            return
        if isinstance(received, QueuedRequest):
            self._queue.add(received)
        elif received is not None and (abandoned := received()) is not None:
            self._abandoned.append(abandoned)

    def _resolve_abandoned(self) -> None:
        abandoned, self._abandoned = list(dict.fromkeys(queued for queued in self._abandoned if not queued.finished)), []
        resolve_all(dict.fromkeys(abandoned))
        self._queue.discard(abandoned)

    def _remaining_wait(self, first: QueuedRequest) -> float:
        """Return the seconds that the first request may still wait: 0 if a batch is full, requests are running, or no more can come."""
        if self._stopping or self._queue.running or self._queue.samples(first.batch_key) >= self._limit:
            return 0.0
        return first.request.start + self._max_wait - time.perf_counter()

    def _run_step(self, batch: Sequence[QueuedRequest]) -> None:
        """Evaluate one step of a batch, and resolve the requests that it finishes."""
        loop = batch[0].loop
        without_callback = [queued for queued in batch if queued.request.on_step is None]
        with_callback = [queued for queued in batch if queued.request.on_step is not None]
        outcomes: Outcomes = {}

        def job() -> None:
            self._run_isolating_failures(_step, batch, outcomes)
            for queued in without_callback:
                self._after_step(queued, run_inline, outcomes)
            self._decode_done(without_callback, outcomes)

        loop.engine.run(job)
        resolve_all(outcomes)
        for queued in with_callback:
            self._in_callback = True
            self._after_step(queued, loop.engine.run, outcomes)
            self._in_callback = False
        if any(_is_done(queued, outcomes) for queued in with_callback):
            loop.engine.run(lambda: self._decode_done(with_callback, outcomes))
        resolve_all(outcomes)
        self._queue.drop_finished()

    def _after_step(self, queued: QueuedRequest, run: Callable[[Callable[[], Any]], Any], outcomes: Outcomes) -> None:
        """Check the state of a request after a step, and call its callback."""
        if queued in outcomes or queued.finished or queued.abandoned:
            return

        def run_for_request(job: Callable[[], Any]) -> Any:
            return self._compute_for([queued], CancelScope(), partial(run, job))

        try:
            queued.loop.after_step(queued.request, run_for_request)
        except BaseException as error:  # noqa: BLE001 - the user's callback raised: the future gets the error
            outcomes[queued] = error

    def _decode_done(self, batch: Sequence[QueuedRequest], outcomes: Outcomes) -> None:
        """Decode the requests whose steps are done."""

        def decode(done: Sequence[QueuedRequest]) -> None:
            outcomes.update(zip(done, done[0].loop.decode_finished([queued.request for queued in done]), strict=True))

        self._run_isolating_failures(decode, [queued for queued in batch if _is_done(queued, outcomes)], outcomes)

    def _compute_for(self, batch: Sequence[QueuedRequest], scope: CancelScope, work: Callable[[], Result]) -> Result:
        """Do work for some requests in a scope, and return its result. Its runs end early if all of the requests are abandoned."""
        self._computing = scope, batch
        try:
            _cancel_if_abandoned(scope, batch)
            return scope.call(work)
        finally:
            self._computing = None

    def _run_isolating_failures(self, work: Callable[[Sequence[QueuedRequest]], None], batch: Sequence[QueuedRequest], outcomes: Outcomes) -> None:
        """Do work for a whole batch. If it fails, repeat it in halves if memory ran out, else one by one, so that only the faulty requests fail."""
        batch = [queued for queued in batch if not queued.abandoned]
        if not batch:
            return
        scope = CancelScope()
        try:
            self._compute_for(batch, scope, partial(work, batch))
        except BaseException as error:  # noqa: BLE001 - the future of the request that caused it gets it
            if scope.cancelled:
                return
            if len(batch) == 1:
                outcomes[batch[0]] = error
                return
            if isinstance(error, GeneratorClosedError):
                outcomes.update((queued, _closed_error(queued, error.__cause__)) for queued in batch)
                return
            size = 1
            if isinstance(error, OutOfMemoryError):
                size, samples = len(batch) // 2, sum(map(len, batch))
                self._limit = max(1, samples // 2)
                log.warning("Memory ran out with %d samples in one batch: going on with at most %d until the queue is empty.", samples, self._limit)
        else:
            return
        for start in range(0, len(batch), size):
            self._run_isolating_failures(work, batch[start : start + size], outcomes)


def check_batching(max_batch_size: object, max_wait_ms: object, max_queue: object) -> tuple[int, float, int | None]:
    """Return the arguments of ``BatchScheduler`` for those of the Generator. Raises InvalidArgumentError if one is out of range."""
    longest = 3_600_000
    if not is_int(max_batch_size) or cast(int, max_batch_size) < 1:
        raise InvalidArgumentError(f"max_batch_size must be an integer of at least 1, got {max_batch_size!r}")
    if isinstance(max_wait_ms, bool) or not isinstance(max_wait_ms, int | float) or not 0 <= max_wait_ms <= longest:
        raise InvalidArgumentError(f"max_wait_ms must be a number of milliseconds from 0 to {longest}, got {max_wait_ms!r}")
    if max_queue is not None and (not is_int(max_queue) or cast(int, max_queue) < 1):
        raise InvalidArgumentError(f"max_queue must be an integer of at least 1, or None for no limit, got {max_queue!r}")
    return int(cast(int, max_batch_size)), max_wait_ms / 1e3, cast("int | None", max_queue)


def _step(batch: Sequence[QueuedRequest]) -> None:
    """Evaluate the next step of a batch, or all of them at once if the engine can and all requests are new."""
    loop = batch[0].loop
    if not any(queued.started or queued.request.on_step for queued in batch) and loop.evaluate_all([queued.request for queued in batch]):
        for queued in batch:
            queued.started = True
        return
    for queued in batch:
        if not queued.started:
            loop.start(queued.request)
            queued.started = True
    loop.step([queued.request for queued in batch])


def _is_done(queued: QueuedRequest, outcomes: Outcomes) -> bool:
    """Return True if a request has no step left and no outcome yet."""
    return queued.request.trajectory.done and not queued.finished and queued not in outcomes and not queued.abandoned


def _cancel_if_abandoned(scope: CancelScope, batch: Sequence[QueuedRequest]) -> None:
    if all(queued.abandoned for queued in batch):
        scope.cancel(lambda: GenerationCancelledError("every request of the batch was cancelled"))


def _weak_method(method: Callable[[QueuedRequest], None], queued: QueuedRequest) -> Callable[[], None]:
    """Return a function that calls a scheduler's method with a request, if both still exist: a future that its caller keeps must keep neither."""
    weak_method, reference = weakref.WeakMethod(method), weakref.ref(queued)

    def call() -> None:
        if (bound := weak_method()) is not None and (argument := reference()) is not None:
            bound(argument)

    return call


def _closed_error(queued: QueuedRequest, cause: BaseException | None = None) -> GeneratorClosedError:
    """Return a new error for each request: raising one error twice would extend its traceback."""
    error = closed_error("while this call ran" if queued.started else "before this request's turn came")
    error.__cause__ = cause
    return error
