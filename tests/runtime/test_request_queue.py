"""The queue behind ``submit``, compared with a plain list that is searched completely; and how callers take turns."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scm_runtime.samples import Samples
from scm_runtime.sampling import request_queue
from scm_runtime.sampling.caller import Caller, current_caller
from scm_runtime.sampling.queued_request import QueuedRequest, RequestStatus
from scm_runtime.sampling.request_queue import RequestQueue


class Trajectory(SimpleNamespace):
    def __len__(self) -> int:
        return int(self.n)


def queued(n: int, tokens: int = 3, caller: Caller | None = None) -> QueuedRequest:
    """A request for n samples whose conditioning has a dynamic size, by default of this thread."""
    trajectory = Trajectory(n=n, call=SimpleNamespace(conditioning={"text": np.empty((n, tokens))}))
    future: Future[Samples] = Future()
    request: Any = SimpleNamespace(trajectory=trajectory)
    made = QueuedRequest(SimpleNamespace(), request, future, lambda: None)  # type: ignore[arg-type]  # the queue does not use the loop
    if caller is not None:
        made.caller = caller
    return made


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
        assert sorted(one.order for one in queue) == [one.order for one in plain]
        assert queue.first() is (plain[0] if plain else None)
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
    assert (len(queue), queue.first(), list(queue)) == (0, None, [])


def test_the_search_for_requests_that_fit_ends() -> None:
    queue = RequestQueue()
    sizes = [5, *[4] * request_queue.MAX_SKIPPED, 1]
    requests = [queued(n, tokens=3) for n in sizes]
    for one in requests:
        queue.add(one)
    assert [len(one) for one in queue.schedule(8)] == [5]
    assert sorted(queue, key=lambda one: one.order) == requests, "requests that were skipped keep their order"


def test_cancelled_requests_do_not_stay_in_memory() -> None:
    queue, requests = RequestQueue(), [queued(1, tokens=3) for _ in range(1000)]
    for one in requests:
        queue.add(one)
    for one in requests[1:]:
        one.status = RequestStatus.FINISHED
        queue.discard([one])
    assert sum(map(len, queue._waiting.values())) <= 2 * request_queue.MAX_SKIPPED
    assert queue.schedule(8) == requests[:1]


# ----------------------------------------------------------------------------
# Turns.


def served(queue: RequestQueue, limit: int = 1) -> list[QueuedRequest]:
    """Finish the next batch, and return its requests."""
    batch = queue.schedule(limit)
    for one in batch:
        one.status = RequestStatus.FINISHED
    queue.drop_finished()
    return batch


def add_all(queue: RequestQueue, requests: list[QueuedRequest]) -> list[QueuedRequest]:
    for one in requests:
        queue.add(one)
    return requests


@pytest.mark.parametrize("limit", [1, 8])
def test_one_request_does_not_wait_for_ten_thousand_of_another_caller(limit: int) -> None:
    queue, many = RequestQueue(), Caller()
    add_all(queue, [queued(1, caller=many) for _ in range(10_000)])
    for _ in range(3):
        served(queue, limit)
    one = queued(1)
    queue.add(one)
    assert one in [*served(queue, limit), *served(queue, limit)]


def test_callers_take_turns_and_their_requests_keep_their_order() -> None:
    queue, callers = RequestQueue(), [Caller(), Caller(), Caller()]
    first, second, third = (add_all(queue, [queued(1, caller=caller) for _ in range(n)]) for caller, n in zip(callers, (4, 2, 1), strict=True))
    order = [served(queue)[0] for _ in range(7)]
    assert order == [first[0], second[0], third[0], first[1], second[1], first[2], first[3]]


def test_a_caller_that_submits_again_and_again_does_not_hold_up_the_others() -> None:
    queue, again = RequestQueue(), Caller()
    waiting = add_all(queue, [queued(1, caller=Caller()) for _ in range(2)])
    waiting += add_all(queue, [queued(1, caller=waiting[0].caller)])
    order = []
    for _ in range(8):
        queue.add(queued(1, caller=again))
        order += served(queue)
    assert set(waiting) <= set(order)


def test_new_callers_without_end_do_not_hold_up_the_others() -> None:
    """More requests arrive than are served, each of a task of its own."""
    queue = RequestQueue()
    waiting = add_all(queue, [queued(1) for _ in range(4)])
    order = []
    for _ in range(60):
        add_all(queue, [queued(1, caller=Caller()) for _ in range(2)])
        order += served(queue)
    assert set(waiting) <= set(order)


def test_cancelled_requests_use_up_no_turns() -> None:
    queue, many, other = RequestQueue(), Caller(), Caller()
    cancelled = add_all(queue, [queued(1, caller=many) for _ in range(1000)])
    last = add_all(queue, [queued(1, caller=many)])
    add_all(queue, [queued(1, caller=other) for _ in range(100)])
    for one in cancelled:
        one.status = RequestStatus.FINISHED
    queue.discard(cancelled)
    assert last[0] in [*served(queue), *served(queue)]


def test_a_caller_is_a_thread_or_a_task() -> None:
    async def in_tasks() -> list[Caller]:
        async def caller() -> Caller:
            assert current_caller() is current_caller()
            return current_caller()

        return [*await asyncio.gather(caller(), caller()), await caller(), await caller()]

    first, second, third, fourth = asyncio.run(in_tasks())
    with ThreadPoolExecutor(1) as pool:
        callers = {first, second, third, current_caller(), pool.submit(current_caller).result()}
    assert len(callers) == 5
    assert third is fourth, "the task that awaits both"
    assert current_caller() is current_caller()
