"""Requests that nobody wants any more: their step ends early if nobody shares it, and they hold up no other request. Every slow step here takes minutes."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toy_bundle
from scheduler_control import TIMEOUT_S, engine_of, record_batches, scheduler_blocked, step_started_event, wait_until
from scm_runtime import DevicePool, Generator, Samples
from scm_runtime.engines.engine import Trajectory

EMBEDS = np.ones((2, toy_bundle.WIDTH), np.float32)
FAST: dict[str, Any] = {"prompt_embeds": EMBEDS, "seed": 1, "output_type": "latent"}
LONG_LOOP: dict[str, Any] = {**FAST, "guidance_scale": toy_bundle.SLOW_GUIDANCE}
LONG_OPERATOR: dict[str, Any] = {**FAST, "conditioning": {"score": toy_bundle.SLOW_SCORE}, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def slow_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_bundle.write_text_bundle(tmp_path_factory.mktemp("slow") / "slow.scm", graphs={"step": toy_bundle.SLOW_STEP})


@pytest.fixture
def slow(slow_bundle: Path) -> Iterator[Generator]:
    generator = Generator(slow_bundle, threads=1)
    yield generator
    generator.close()


def check_usable(generator: Generator) -> None:
    """Assert that nothing runs any more that a new request would have to wait for, and that it has the right samples."""
    np.testing.assert_allclose(generator.submit(**FAST).result(TIMEOUT_S).array, toy_bundle.sample([1], EMBEDS), atol=1e-6)
    np.testing.assert_allclose(generator(**FAST).array, toy_bundle.sample([1], EMBEDS), atol=1e-6)


def running_request(generator: Generator, **arguments: Any) -> Future[Samples]:
    """Submit a request, and return its future once a step is running."""
    step_started = step_started_event(engine_of(generator))
    future = generator.submit(**{**LONG_LOOP, **arguments})
    assert step_started.wait(TIMEOUT_S)
    return future


def test_cancelling_a_future_ends_its_step(slow: Generator) -> None:
    future = running_request(slow)
    assert future.cancel()
    assert wait([future], TIMEOUT_S).done
    with pytest.raises(CancelledError):
        future.result()
    check_usable(slow)


def test_a_step_ends_once_all_its_requests_are_cancelled(slow: Generator) -> None:
    step_started = step_started_event(engine_of(slow))
    with scheduler_blocked(slow, prompt_embeds=EMBEDS):
        futures = [slow.submit(**LONG_LOOP) for _ in range(3)]
        step_started.clear()
    assert step_started.wait(TIMEOUT_S)
    assert [future.cancel() for future in futures] == [True] * 3
    check_usable(slow)


def test_a_step_goes_on_for_the_requests_that_are_not_cancelled(slow: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_batches(slow, monkeypatch)
    step_started = step_started_event(engine_of(slow))
    both = {**LONG_OPERATOR, "num_inference_steps": 2}
    with scheduler_blocked(slow, prompt_embeds=EMBEDS):
        unwanted, wanted = slow.submit(**{**both, "seed": 2}), slow.submit(**{**both, "seed": 3})
        step_started.clear()
    assert step_started.wait(TIMEOUT_S)
    assert unwanted.cancel()
    np.testing.assert_allclose(wanted.result(TIMEOUT_S).array, toy_bundle.sample([3], EMBEDS, score=toy_bundle.SLOW_SCORE), atol=1e-5)
    assert batches[1:] == [[(2, 0), (3, 0)], [(3, 1)]], "the cancelled request is in no further step"


def test_cancelling_a_task_ends_its_step(slow: Generator) -> None:
    async def main() -> None:
        step_started = step_started_event(engine_of(slow))
        task = asyncio.ensure_future(slow.async_(**LONG_LOOP))
        await asyncio.to_thread(step_started.wait, TIMEOUT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    check_usable(slow)


def test_a_time_limit_of_asyncio_ends_the_step(slow: Generator) -> None:
    async def main() -> None:
        await asyncio.wait_for(slow.async_(**LONG_LOOP), 0.2)

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    check_usable(slow)


@pytest.mark.parametrize("close", [True, False], ids=["closed", "deleted"])
def test_leaving_a_stream_ends_the_batch_that_it_computes_ahead(close: bool, slow_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Generator(slow_bundle, threads=1, max_batch_size=1) as generator:
        batches = record_batches(generator, monkeypatch)
        stream = generator.stream(2, prompt_embeds=EMBEDS, seed=1, output_type="latent", guidance_scale=[1.0, toy_bundle.SLOW_GUIDANCE])
        next(stream)
        wait_until(lambda: (2, 0) in batches[-1])
        if close:
            stream.close()
        del stream
        check_usable(generator)


def test_cancelling_requests_of_a_pool_ends_their_steps(slow_bundle: Path) -> None:
    with DevicePool(slow_bundle, devices=("cpu", "cpu"), threads=1) as pool:
        started = [step_started_event(engine_of(generator)) for generator in pool.generators]
        futures = [pool.submit(**LONG_LOOP) for _ in range(2)]
        assert all(event.wait(TIMEOUT_S) for event in started)
        assert all(future.cancel() for future in futures)
        for generator in pool.generators:
            check_usable(generator)


def test_a_cancelled_request_frees_its_memory(slow: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    trajectories: list[weakref.ref[Trajectory]] = []
    engine = engine_of(slow)
    step = engine.step

    def remember(batch: Sequence[Trajectory]) -> None:
        trajectories.extend(map(weakref.ref, batch))
        step(batch)

    monkeypatch.setattr(engine, "step", remember)
    future = running_request(slow)
    assert future.cancel()
    check_usable(slow)
    gc.collect()
    assert trajectories[0]() is None
    assert future.cancelled(), "the future that is kept does not keep the request"
