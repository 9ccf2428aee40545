"""Requests that nobody wants any more: their step ends early if nobody shares it, and they hold up no other request. Every slow step here takes minutes."""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toy_bundle
from scheduler_control import TIMEOUT_S, engine_of, record_batches, scheduler_blocked, step_started_event, wait_until
from scm_runtime import DevicePool, GenerationTimeoutError, Generator, GeneratorClosedError, InferenceError, InvalidArgumentError, Samples
from scm_runtime.common import deadlines
from scm_runtime.engines.engine import Trajectory
from scm_runtime.sampling import durations
from toy_bundle import EMBEDS, FAST, LONG_LOOP, LONG_OPERATOR


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


# ----------------------------------------------------------------------------
# Timeouts.


@pytest.mark.parametrize("callback", [None, lambda *_: None])
def test_a_call_ends_at_its_timeout(callback: Any, slow: Generator) -> None:
    with pytest.raises(GenerationTimeoutError, match=r"not finished within timeout=0\.3 seconds"):
        slow(**LONG_LOOP, timeout=0.3, callback_on_step_end=callback)
    check_usable(slow)


def test_a_call_of_another_thread_ends_at_its_timeout(slow: Generator) -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(GenerationTimeoutError):
        pool.submit(lambda: slow(**LONG_LOOP, timeout=0.3)).result(TIMEOUT_S)
    check_usable(slow)


def test_a_submitted_request_ends_at_its_timeout(slow: Generator) -> None:
    futures = [slow.submit(**LONG_LOOP, timeout=0.3) for _ in range(2)]
    errors = [future.exception(TIMEOUT_S) for future in futures]
    assert all(isinstance(error, GenerationTimeoutError) and isinstance(error, TimeoutError) for error in errors)
    assert errors[0] is not errors[1]
    check_usable(slow)


def test_a_timeout_includes_the_time_in_the_queue(slow: Generator) -> None:
    with scheduler_blocked(slow, prompt_embeds=EMBEDS):
        late, patient = slow.submit(**FAST, timeout=0.1), slow.submit(**FAST, timeout=TIMEOUT_S)
        assert isinstance(late.exception(TIMEOUT_S), GenerationTimeoutError), "although the queue is still blocked"
    np.testing.assert_allclose(patient.result(TIMEOUT_S).array, toy_bundle.sample([1], EMBEDS), atol=1e-6)


def test_a_timeout_ends_only_its_own_request_of_a_batch(slow: Generator) -> None:
    with scheduler_blocked(slow, prompt_embeds=EMBEDS):
        late, other = slow.submit(**LONG_OPERATOR, timeout=0.2), slow.submit(**{**LONG_OPERATOR, "seed": 3})
    assert isinstance(late.exception(TIMEOUT_S), GenerationTimeoutError)
    np.testing.assert_allclose(other.result(TIMEOUT_S).array, toy_bundle.sample([3], EMBEDS, score=toy_bundle.SLOW_SCORE, steps=1), atol=1e-5)


def test_a_task_gets_the_error_of_its_timeout(slow: Generator) -> None:
    with pytest.raises(GenerationTimeoutError):
        asyncio.run(slow.async_(**LONG_LOOP, timeout=0.3))
    check_usable(slow)


def test_the_timeout_of_a_stream_is_for_all_of_its_batches(slow_bundle: Path) -> None:
    with Generator(slow_bundle, threads=1, max_batch_size=1) as generator:
        stream = generator.stream(2, prompt_embeds=EMBEDS, seed=1, output_type="latent", guidance_scale=[1.0, toy_bundle.SLOW_GUIDANCE], timeout=5)
        assert next(stream).seeds == (1,)
        with pytest.raises(GenerationTimeoutError, match=r"timeout=5 seconds"):
            next(stream)
        check_usable(generator)


def test_a_pool_passes_the_timeout_on(slow_bundle: Path) -> None:
    with DevicePool(slow_bundle, devices=("cpu",), threads=1) as pool:
        with pytest.raises(GenerationTimeoutError):
            pool(**LONG_LOOP, timeout=0.3)
        assert isinstance(pool.submit(**LONG_LOOP, timeout=0.3).exception(TIMEOUT_S), GenerationTimeoutError)


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, 10**400, "1", True])
def test_a_timeout_must_be_a_finite_number_above_zero(timeout: Any, slow: Generator) -> None:
    calls: list[Callable[..., object]] = [slow, slow.submit, lambda **arguments: slow.stream(2, **arguments)]
    for call in calls:
        with pytest.raises(InvalidArgumentError, match="timeout must be a number of seconds above 0, or None for no limit, got"):
            call(prompt_embeds=EMBEDS, timeout=timeout)


def test_timeouts_that_are_not_reached_keep_nothing_alive(slow: Generator) -> None:
    """A service gives every request a timeout of a minute: the finished ones must not stay in memory for it."""
    for _ in range(300):
        slow.submit(**FAST, num_inference_steps=1, timeout=3600).result(TIMEOUT_S)
    gc.collect()
    alive = [one for one in gc.get_objects() if type(one) is deadlines.Timer]
    assert len(alive) <= deadlines.MIN_KEPT + 1


def test_a_thread_that_cannot_be_started_for_a_timeout_is_a_typed_error(slow: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(deadlines, "_watcher", None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(InferenceError, match="cannot start the thread that ends calls at their timeout: can't start new thread"):
            slow(**FAST, timeout=60)
    check_usable(slow)


# ----------------------------------------------------------------------------
# Signals in the main thread.


@contextmanager
def handled_by(handler: Callable[..., object], number: int) -> Iterator[None]:
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)


def signal_during_step(generator: Generator, number: int) -> threading.Thread:
    """Start a thread that sends a signal to the main thread while a step runs."""
    step_started, main = step_started_event(engine_of(generator)), threading.main_thread().ident
    assert main is not None

    def send() -> None:
        assert step_started.wait(TIMEOUT_S)
        time.sleep(0.1)  # until the middle of the step
        signal.pthread_kill(main, number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("callback", [None, lambda *_: None])
def test_ctrl_c_ends_the_step_of_a_call(callback: Any, slow: Generator) -> None:
    with handled_by(signal.default_int_handler, signal.SIGINT):
        thread = signal_during_step(slow, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            slow(**LONG_LOOP, callback_on_step_end=callback)
        thread.join()
    check_usable(slow)


def test_ctrl_c_ends_decoding(tmp_path: Path) -> None:
    bundle = toy_bundle.write_text_bundle(tmp_path / "slow.scm", graphs={"decode": toy_bundle.SLOW_DECODE})
    main = threading.main_thread().ident
    assert main is not None
    with Generator(bundle, threads=1) as generator, handled_by(signal.default_int_handler, signal.SIGINT):
        interrupting = threading.Timer(0.5, lambda: signal.pthread_kill(main, signal.SIGINT))
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            generator.decode(np.full((1, *toy_bundle.SAMPLE_SHAPE), 200))
        assert generator.decode(np.zeros((1, *toy_bundle.SAMPLE_SHAPE))).shape == (1, *toy_bundle.IMAGE_SHAPE)


def test_a_call_of_the_main_thread_computes_in_another_thread_unless_it_is_brief(slow: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, threads = engine_of(slow), []
    start = engine.start

    def recorded(trajectory: Trajectory) -> None:
        threads.append(threading.current_thread())
        start(trajectory)

    monkeypatch.setattr(engine, "start", recorded)
    monkeypatch.setattr(durations, "BRIEF_S", 0.0)
    slow(**FAST)
    slow(**FAST)
    monkeypatch.setattr(durations, "BRIEF_S", TIMEOUT_S)
    slow(**FAST)
    slow(**{**FAST, "seed": [1, 2]})  # another batch size, of which nothing is known
    in_another, again, brief, unknown = threads
    assert in_another is again is unknown is not threading.main_thread()
    assert brief is threading.main_thread()


def test_ctrl_c_during_a_brief_call_leaves_the_generator_usable(slow: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durations, "BRIEF_S", TIMEOUT_S)
    slow(**FAST)
    with monkeypatch.context() as patch, handled_by(signal.default_int_handler, signal.SIGINT):
        patch.setattr(engine_of(slow), "start", lambda _: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            slow(**FAST)
    check_usable(slow)


def test_a_signal_handler_that_returns_does_not_end_the_call(slow: Generator) -> None:
    received: list[int] = []
    with handled_by(lambda number, _: received.append(number), signal.SIGUSR1):
        thread = signal_during_step(slow, signal.SIGUSR1)
        array = slow(**LONG_OPERATOR).array
        thread.join()
    np.testing.assert_allclose(array, toy_bundle.sample([1], EMBEDS, score=toy_bundle.SLOW_SCORE, steps=1), atol=1e-5)
    assert received == [signal.SIGUSR1]


def test_a_signal_handler_may_close_the_generator_within_a_step(slow: Generator) -> None:
    with handled_by(lambda *_: slow.close(), signal.SIGUSR1):
        thread = signal_during_step(slow, signal.SIGUSR1)
        with pytest.raises(GeneratorClosedError):
            slow(**LONG_LOOP)
        thread.join()


def test_a_signal_handler_may_call_the_generator_that_it_interrupts(slow: Generator) -> None:
    inner: list[Samples] = []
    with handled_by(lambda *_: inner.append(slow(**FAST)), signal.SIGUSR1):
        thread = signal_during_step(slow, signal.SIGUSR1)
        slow(**LONG_OPERATOR)
        thread.join()
    np.testing.assert_allclose(inner[0].array, toy_bundle.sample([1], EMBEDS), atol=1e-6)


def test_a_call_works_if_no_thread_can_be_started(slow: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    np.testing.assert_allclose(slow(**FAST).array, toy_bundle.sample([1], EMBEDS), atol=1e-6)
