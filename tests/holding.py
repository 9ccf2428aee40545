"""To say what a Generator's scheduler finds in its line, without sleeping: hold it, look at what it computes."""

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

PATIENCE_S = 60.0


@contextmanager
def held(generator: Generator, **arguments: Any) -> Iterator[Future[Samples]]:
    """Within the block the scheduler sits in a callback of a request of one step, seed 0: what is submitted meanwhile waits, and then starts together."""
    entered, release = threading.Event(), threading.Event()

    def callback(*_: object) -> None:
        entered.set()
        assert release.wait(PATIENCE_S)

    future = generator.submit(seed=0, num_inference_steps=1, output_type="np", callback_on_step_end=callback, **arguments)
    assert entered.wait(PATIENCE_S)
    try:
        yield future
    finally:
        release.set()


def engine_of(generator: Generator) -> Any:
    """What computes for it."""
    assert generator._loop.resource is not None
    return generator._loop.resource.engine


def stepping(engine: Any) -> threading.Event:
    """Set when the engine begins to run its step graph; for the host's engine."""
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


def recorded(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """From now on: for each evaluation of the step, of each request its first seed and the step it is at."""
    rounds: list[list[tuple[int, int]]] = []
    engine = engine_of(generator)
    advance: Callable[[Sequence[Trajectory]], None] = engine.step

    def note(trajectories: Sequence[Trajectory]) -> None:
        rounds.append([(int(one.call.seeds[0]), one.evaluations_done) for one in trajectories])
        advance(trajectories)

    monkeypatch.setattr(engine, "step", note)
    return rounds


def schedulers() -> list[threading.Thread]:
    """The threads that work off requests now."""
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def eventually(what: Callable[[], object]) -> None:
    """Wait until it holds: what another thread does last, nobody can wait for."""
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.001)
