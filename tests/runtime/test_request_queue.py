"""The queue behind ``submit``, compared with a plain list that is searched completely."""

from __future__ import annotations

import random
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scm_runtime.samples import Samples
from scm_runtime.sampling import request_queue
from scm_runtime.sampling.queued_request import QueuedRequest, RequestStatus
from scm_runtime.sampling.request_queue import RequestQueue


class Trajectory(SimpleNamespace):
    def __len__(self) -> int:
        return int(self.n)


def queued(n: int, tokens: int) -> QueuedRequest:
    """A request for n samples whose conditioning has a dynamic size."""
    trajectory = Trajectory(n=n, call=SimpleNamespace(conditioning={"text": np.empty((n, tokens))}))
    future: Future[Samples] = Future()
    request: Any = SimpleNamespace(trajectory=trajectory)
    return QueuedRequest(SimpleNamespace(), request, future, lambda: None)  # type: ignore[arg-type]  # the queue does not use the loop


def expected_batch(requests: list[QueuedRequest], limit: int) -> list[QueuedRequest]:
    batch, samples = [requests[0]], len(requests[0])
    for one in requests[1:]:
        if one.batch_key == requests[0].batch_key and samples + len(one) <= limit:
            batch.append(one)
            samples += len(one)
    return batch


@pytest.mark.parametrize("seed", range(20))
def test_batches_are_those_of_a_search_through_all_requests(seed: int) -> None:
    rng = random.Random(seed)
    queue, plain, limit = RequestQueue(), list[QueuedRequest](), 8
    for _ in range(300):
        for _ in range(rng.choice((0, 0, 1, 3))):
            one = queued(rng.choice((1, 1, 2, 5, 12)), tokens=rng.choice((3, 4, 5)))
            queue.add(one)
            plain.append(one)
        cancelled = [one for one in plain if rng.random() < 0.05]
        for one in cancelled:
            one.status = RequestStatus.FINISHED
        queue.discard(cancelled)
        plain = [one for one in plain if not one.finished]
        assert len(queue) == len(plain)
        assert sorted(one.arrival for one in queue) == [one.arrival for one in plain]
        assert queue.oldest() is (plain[0] if plain else None)
        for tokens in (3, 4, 5):
            key = queued(1, tokens).batch_key
            assert queue.samples(key) == sum(len(one) for one in plain if one.batch_key == key)
        if not plain:
            continue
        batch = queue.schedule(limit)
        assert batch == expected_batch(plain, limit)
        assert all(one.status is RequestStatus.RUNNING for one in batch)
        for one in batch:
            if rng.random() < 0.5:
                one.status = RequestStatus.FINISHED
        queue.drop_finished()
        plain = [one for one in plain if not one.finished]
    queue.clear()
    assert (len(queue), queue.oldest(), list(queue)) == (0, None, [])


def test_the_search_for_requests_that_fit_ends() -> None:
    queue = RequestQueue()
    sizes = [5, *[4] * request_queue.MAX_SKIPPED, 1]
    for n in sizes:
        queue.add(queued(n, tokens=3))
    assert [len(one) for one in queue.schedule(8)] == [5]
    assert [one.arrival for one in queue] == list(range(len(sizes))), "requests that were skipped keep their order"


def test_cancelled_requests_do_not_stay_in_memory() -> None:
    queue, requests = RequestQueue(), [queued(1, tokens=3) for _ in range(1000)]
    for one in requests:
        queue.add(one)
    for one in requests[1:]:
        one.status = RequestStatus.FINISHED
        queue.discard([one])
    assert sum(map(len, queue._waiting.values())) <= 2 * request_queue.MAX_SKIPPED
    assert queue.schedule(8) == requests[:1]
