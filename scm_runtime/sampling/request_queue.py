"""The queue of ``submit``: running and waiting requests, and which of them are computed next.

Callers take turns: however many requests one of them queues, the next request of another waits for at most a few of them. A caller is a thread or an asyncio
task. The requests of one caller keep their order. The time of an operation depends on the batch size and the number of different batch keys; that of adding
and starting a request grows with the logarithm of the number of waiting requests.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count
from operator import attrgetter
from weakref import WeakKeyDictionary

from scm_runtime.sampling.caller import Caller
from scm_runtime.sampling.queued_request import BatchKey, QueuedRequest, RequestStatus

MAX_SKIPPED = 64  # waiting requests that do not fit into a batch, before the search for smaller ones ends

Waiting = list[tuple[tuple[int, int], QueuedRequest]]  # a heap by order

_order = attrgetter("order")


class RequestQueue:
    """Requests in order of their turns. Only the scheduler's thread uses it.

    A caller's n-th waiting request has the n-th next turn; within a turn the order is that of arrival. A new caller begins with the turn after the present
    one: callers that come later cannot hold up a turn without end.
    """

    def __init__(self) -> None:
        self.running: list[QueuedRequest] = []
        """Requests that were scheduled and are not finished, in order."""
        # Without empty heaps. The first request of a heap is unfinished; a finished one behind it is removed when it comes first.
        self._waiting: dict[BatchKey, Waiting] = {}
        self._waiting_samples: dict[BatchKey, int] = {}  # unfinished ones only
        self._arrivals = count()
        self._turn = 0  # the present one: the latest of all requests that were scheduled
        self._latest_turns: WeakKeyDictionary[Caller, int] = WeakKeyDictionary()  # of each caller's requests
        self._length = self._finished_waiting = 0

    def __len__(self) -> int:
        """Return the number of unfinished requests."""
        return self._length

    def __iter__(self) -> Iterator[QueuedRequest]:
        """Iterate over all unfinished requests. The time grows with their number."""
        for queued in (*self.running, *(queued for waiting in self._waiting.values() for _, queued in waiting)):
            if not queued.finished:
                yield queued

    def add(self, queued: QueuedRequest) -> None:
        """Append a waiting request to those of its caller."""
        self._push(queued, next(self._arrivals))
        self._length += 1

    def _push(self, queued: QueuedRequest, arrival: int) -> None:
        turn = 1 + max(self._turn, self._latest_turns.get(queued.caller, 0))
        self._latest_turns[queued.caller] = turn
        queued.order = turn, arrival
        heapq.heappush(self._waiting.setdefault(queued.batch_key, []), (queued.order, queued))
        self._waiting_samples[queued.batch_key] = self._waiting_samples.get(queued.batch_key, 0) + len(queued)

    def first(self) -> QueuedRequest | None:
        """Return the unfinished request whose turn it is, or None if the queue is empty."""
        return min((*self.running[:1], *(waiting[0][1] for waiting in self._waiting.values())), key=_order, default=None)

    def samples(self, key: BatchKey) -> int:
        """Return the number of samples of unfinished requests with a batch key."""
        return self._waiting_samples.get(key, 0) + sum(len(queued) for queued in self.running if queued.batch_key == key)

    def schedule(self, limit: int) -> list[QueuedRequest]:
        """Return the next batch, whose requests are running from now on.

        It has the first request, however large, and later ones with the same batch key that fit into ``limit`` samples. The queue must not be empty.
        """
        first = self.first()
        assert first is not None
        running = deque(queued for queued in self.running if queued.batch_key == first.batch_key)
        waiting = self._waiting.get(first.batch_key, [])
        batch, skipped, samples = list[QueuedRequest](), list[QueuedRequest](), 0
        while samples < limit and len(skipped) < MAX_SKIPPED and (running or waiting):
            from_waiting = not running or (bool(waiting) and waiting[0][0] < running[0].order)
            queued = heapq.heappop(waiting)[1] if from_waiting else running.popleft()
            if queued.finished:
                self._finished_waiting -= 1
            elif not batch or samples + len(queued) <= limit:
                batch.append(queued)
                samples += len(queued)
                if from_waiting:
                    self._start(queued)
            elif from_waiting:
                skipped.append(queued)
        for queued in skipped:
            heapq.heappush(waiting, (queued.order, queued))
        self._drop_finished_heads(first.batch_key)
        return batch

    def drop_finished(self) -> None:
        """Remove finished requests from the running ones."""
        before = len(self.running)
        self.running = [queued for queued in self.running if not queued.finished]
        self._length -= before - len(self.running)

    def discard(self, cancelled: Iterable[QueuedRequest]) -> None:
        """Remove requests that were finished because they were cancelled."""
        waited = [queued for queued in cancelled if queued not in self.running]
        for queued in waited:
            self._waiting_samples[queued.batch_key] -= len(queued)
        self._length -= len(waited)
        self._finished_waiting += len(waited)
        self.drop_finished()
        for key in {queued.batch_key for queued in waited}:
            self._drop_finished_heads(key)
        if self._finished_waiting > max(self._length, MAX_SKIPPED):
            self._compact()

    def clear(self) -> None:
        """Remove all requests."""
        self.running.clear()
        self._waiting.clear()
        self._waiting_samples.clear()
        self._latest_turns.clear()
        self._length = self._finished_waiting = 0

    def _start(self, queued: QueuedRequest) -> None:
        self._waiting_samples[queued.batch_key] -= len(queued)
        self._turn = max(self._turn, queued.order[0])
        queued.status = RequestStatus.RUNNING
        insort(self.running, queued, key=_order)

    def _drop_finished_heads(self, key: BatchKey) -> None:
        """Remove finished requests before the first unfinished one of a key, and the key if none is left."""
        waiting = self._waiting.get(key)
        while waiting and waiting[0][1].finished:
            heapq.heappop(waiting)
            self._finished_waiting -= 1
        if not waiting:
            self._waiting.pop(key, None)
            self._waiting_samples.pop(key, None)

    def _compact(self) -> None:
        """Remove finished requests from the waiting ones, so that cancelled requests keep neither their memory nor their turns."""
        waiting = sorted((queued for heap in self._waiting.values() for _, queued in heap if not queued.finished), key=_order)
        self._waiting.clear()
        self._waiting_samples.clear()
        self._latest_turns.clear()
        for queued in waiting:
            self._push(queued, queued.order[1])
        self._finished_waiting = 0
