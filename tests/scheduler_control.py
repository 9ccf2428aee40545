"""Helpers that block and observe a Generator's scheduler in tests, so that no test depends on sleeping."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from scm_runtime import Generator, Samples
from scm_runtime.engines.engine import Trajectory
from scm_runtime.ort.session import Session
from scm_runtime.sampling.scheduler import THREAD_NAME

TIMEOUT_S = 60.0


@contextmanager
def scheduler_blocked(generator: Generator, **arguments: Any) -> Iterator[Future[Samples]]:
    """Context manager: block the scheduler inside a callback of a one-step request with seed 0.

    Requests submitted within the with block wait in the queue and start together at its end. Yields the future of the blocking request.
    """
    entered, release = threading.Event(), threading.Event()

    def callback(*_: object) -> None:
        entered.set()
        assert release.wait(TIMEOUT_S)

    future = generator.submit(seed=0, num_inference_steps=1, output_type="np", callback_on_step_end=callback, **arguments)
    assert entered.wait(TIMEOUT_S)
    try:
        yield future
    finally:
        release.set()


def engine_of(generator: Generator) -> Any:
    """Return the engine of an open Generator."""
    assert generator._loop.resource is not None
    return generator._loop.resource.engine


def step_started_event(engine: Any) -> threading.Event:
    """Return an event that is set when the engine next runs its step graph. Works with the host engine only."""
    graphs, started = engine.graphs(), threading.Event()
    graphs.step = _ObservedSession(graphs.step, started)
    return started


class _ObservedSession:
    def __init__(self, session: Session, started: threading.Event) -> None:
        self._session, self._started = session, started

    def __call__(self, **inputs: Any) -> Any:
        self._started.set()
        return self._session(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def record_batches(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """Record the engine's evaluations from now on.

    Returns a list that grows by one batch per evaluation. A batch lists ``(first seed, steps done)`` for each request in it.
    """
    batches: list[list[tuple[int, int]]] = []
    engine = engine_of(generator)
    original: Callable[[Sequence[Trajectory]], None] = engine.step

    def step(trajectories: Sequence[Trajectory]) -> None:
        batches.append([(int(one.call.seeds[0]), one.evaluations_done) for one in trajectories])
        original(trajectories)

    monkeypatch.setattr(engine, "step", step)
    return batches


def scheduler_threads() -> list[threading.Thread]:
    """Return the scheduler threads of this process that are alive."""
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def wait_until(condition: Callable[[], object]) -> None:
    """Poll until ``condition()`` is true. Use it for state that another thread changes without signaling it."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"not true within {TIMEOUT_S:.0f} s"
        time.sleep(0.001)
