"""Controls a Generator's scheduler in tests without sleeping: holds it, and records what it computes."""

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
    """Block the scheduler in a callback of a one-step request with seed 0, until the block ends.

    Requests submitted within the block wait in the queue and then start together. Yields the future of the blocking request.
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
    """Return an event that is set when the engine next runs its step graph. For the host engine only."""
    graphs, begins = engine.graphs(), threading.Event()
    graphs.step = _Stepping(graphs.step, begins)
    return begins


class _Stepping:
    def __init__(self, session: Session, begins: threading.Event) -> None:
        self._session, self._begins = session, begins

    def __call__(self, **inputs: Any) -> Any:
        self._begins.set()
        return self._session(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def record_batches(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """Return a list that records the evaluations from now on: for each one, the first seed and the current step of each request in it."""
    rounds: list[list[tuple[int, int]]] = []
    engine = engine_of(generator)
    advance: Callable[[Sequence[Trajectory]], None] = engine.step

    def note(trajectories: Sequence[Trajectory]) -> None:
        rounds.append([(int(one.call.seeds[0]), one.evaluations_done) for one in trajectories])
        advance(trajectories)

    monkeypatch.setattr(engine, "step", note)
    return rounds


def scheduler_threads() -> list[threading.Thread]:
    """Return the scheduler threads that are alive."""
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def wait_until(what: Callable[[], object]) -> None:
    """Wait until ``what()`` is true. For state that another thread changes after everything that can be waited for."""
    deadline = time.monotonic() + TIMEOUT_S
    while not what():
        assert time.monotonic() < deadline, f"not true within {TIMEOUT_S:.0f} s"
        time.sleep(0.001)
