"""``close()`` while graphs run: running graphs are terminated, each call and each future gets a separate error, and other Generators are not affected."""

from __future__ import annotations

import gc
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toy_bundle
from scheduler_control import TIMEOUT_S, engine_of, scheduler_blocked, scheduler_threads, step_started_event
from scm_runtime import DevicePool, Generator, GeneratorClosedError, InferenceError
from scm_runtime.engines.engine import Trajectory
from scm_runtime.sampling.nonfinite import NonFiniteHandler
from toy_bundle import EMBEDS, FAST, LONG_LOOP, LONG_OPERATOR


@pytest.fixture
def digits() -> Iterator[Generator]:
    with Generator("digits") as generator:
        yield generator


def check_terminated(error: BaseException | None) -> GeneratorClosedError:
    """Assert that the error is that of a terminated run, and return it."""
    assert isinstance(error, GeneratorClosedError)
    assert not isinstance(error, InferenceError)
    assert "terminate" in str(error.__cause__)
    return error


def in_thread(call: Callable[[], object]) -> Future[object]:
    """Run a function in a daemon thread, so that a hang does not keep the test process alive. Returns a future of its result."""
    future: Future[object] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - the test inspects it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


# ----------------------------------------------------------------------------
# What is terminated.


def test_closing_terminates_the_running_step_and_rejects_waiting_requests(slow: Generator) -> None:
    before, step_started = set(scheduler_threads()), step_started_event(engine_of(slow))
    running = slow.submit(**LONG_LOOP)
    assert step_started.wait(TIMEOUT_S)
    waiting = [slow.submit(**FAST) for _ in range(3)]
    slow.close()
    assert all(future.done() for future in (running, *waiting))
    assert set(scheduler_threads()) <= before, "the thread has ended when close() returns"
    check_terminated(running.exception())
    errors = [future.exception() for future in waiting]
    assert all(isinstance(error, GeneratorClosedError) for error in errors)
    assert len({id(error) for error in errors}) == 3


def test_each_request_of_a_terminated_batch_gets_a_separate_error(slow: Generator) -> None:
    step_started = step_started_event(engine_of(slow))
    with scheduler_blocked(slow, prompt_embeds=EMBEDS):
        step_started.clear()
        futures = [slow.submit(**LONG_LOOP) for _ in range(4)]
    assert step_started.wait(TIMEOUT_S)
    slow.close()
    assert len({id(check_terminated(future.exception(TIMEOUT_S))) for future in futures}) == 4


def test_closing_terminates_the_calls_of_other_threads(slow: Generator) -> None:
    step_started = step_started_event(engine_of(slow))
    called = in_thread(lambda: slow(**LONG_LOOP))
    assert step_started.wait(TIMEOUT_S)
    slow.close()
    check_terminated(called.exception(TIMEOUT_S))


def test_an_exception_in_a_with_block_terminates_running_requests(slow_bundle: Path) -> None:
    futures = []

    def fail() -> None:
        with Generator(slow_bundle, threads=1) as generator:
            step_started = step_started_event(engine_of(generator))
            futures.append(generator.submit(**LONG_LOOP))
            assert step_started.wait(TIMEOUT_S)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    check_terminated(futures[0].exception(0))


def test_closing_a_pool_terminates_the_requests_of_all_devices(slow_bundle: Path) -> None:
    pool = DevicePool(slow_bundle, devices=("cpu", "cpu"), threads=1)
    started = [step_started_event(engine_of(generator)) for generator in pool.generators]
    futures = [pool.submit(**LONG_LOOP) for _ in range(2)]
    assert all(event.wait(TIMEOUT_S) for event in started)
    pool.close()
    for future in futures:
        check_terminated(future.exception(0))


def test_closing_terminates_requests_although_another_thread_waits_in_close(slow: Generator) -> None:
    step_started = step_started_event(engine_of(slow))
    running = slow.submit(**LONG_LOOP)
    assert step_started.wait(TIMEOUT_S)
    waiting = in_thread(lambda: slow.close(wait=True))
    slow.close()
    check_terminated(running.exception(0))
    waiting.result(TIMEOUT_S)


@pytest.mark.parametrize("submitted", [False, True])
def test_closing_terminates_steps_that_are_repeated_in_fp32(submitted: bool, slow_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's steps report non-finite samples, and their repetition in fp32 takes minutes."""
    step_started: list[threading.Event] = []
    open_once = NonFiniteHandler._open_fp32_once

    def opened(handler: NonFiniteHandler) -> Any:
        first, engine = handler._fp32 is None, open_once(handler)
        if first:
            step_started.append(step_started_event(engine))
            fp32_opened.set()
        return engine

    def overflow(trajectories: Sequence[Trajectory]) -> None:
        for one in trajectories:
            one.state.finite, one.state.all_finite = [np.array([False])], False

    fp32_opened = threading.Event()
    monkeypatch.setattr(NonFiniteHandler, "_open_fp32_once", opened)
    with Generator(slow_bundle, threads=1, on_nonfinite="fp32") as generator:
        engine = engine_of(generator)
        monkeypatch.setattr(engine, "dtype", "fp16")
        monkeypatch.setattr(engine, "step", overflow)
        call = generator.submit(**LONG_LOOP) if submitted else in_thread(lambda: generator(**LONG_LOOP))
        assert fp32_opened.wait(TIMEOUT_S)
        assert step_started[0].wait(TIMEOUT_S)
        generator.close()
        check_terminated(call.exception(TIMEOUT_S))


@pytest.mark.parametrize("graph", ["encode", "decode", "preview"])
def test_closing_terminates_encode_and_decode(graph: str, tmp_path: Path) -> None:
    slow = {"encode": toy_bundle.SLOW_ENCODE, "decode": toy_bundle.SLOW_DECODE, "preview": toy_bundle.SLOW_PREVIEW}[graph]
    generator = Generator(toy_bundle.write_text_bundle(tmp_path / "slow.scm", graphs={graph: slow}), threads=1)
    calls: dict[str, Callable[[float], object]] = {
        "encode": lambda value: generator.encode(np.full((1, *toy_bundle.IMAGE_SHAPE), value, np.uint8)),
        "decode": lambda value: generator.decode(np.full((1, *toy_bundle.SAMPLE_SHAPE), value)),
        "preview": lambda value: generator.decode(np.full((1, *toy_bundle.SAMPLE_SHAPE), value), preview=True),
    }
    calls[graph](0)
    called = in_thread(lambda: calls[graph](200))
    with pytest.raises(TimeoutError):
        called.result(0.2)
    generator.close()
    check_terminated(called.exception(TIMEOUT_S))


# ----------------------------------------------------------------------------
# What is not affected.


def test_other_generators_keep_running(slow_bundle: Path, slow: Generator) -> None:
    with Generator(slow_bundle, threads=1) as other:
        started = [step_started_event(engine_of(slow)), step_started_event(engine_of(other))]
        ended, finished = slow.submit(**LONG_LOOP), other.submit(**LONG_OPERATOR)
        assert all(event.wait(TIMEOUT_S) for event in started)
        slow.close()
        check_terminated(ended.exception(0))
        np.testing.assert_allclose(finished.result(TIMEOUT_S).array, expected(), atol=1e-5)


def expected() -> Any:
    return toy_bundle.sample([1], EMBEDS, score=toy_bundle.SLOW_SCORE, steps=1)


def test_a_new_generator_works_with_the_same_cache_after_a_termination(slow_bundle: Path, tmp_path: Path) -> None:
    for _ in range(2):
        generator = Generator(slow_bundle, threads=1, cache_dir=tmp_path)
        np.testing.assert_allclose(generator(**FAST).array, toy_bundle.sample([1], EMBEDS), atol=1e-6)
        step_started = step_started_event(engine_of(generator))
        future = generator.submit(**LONG_LOOP)
        assert step_started.wait(TIMEOUT_S)
        generator.close()
        check_terminated(future.exception(0))


# ----------------------------------------------------------------------------
# Closing from callbacks and signal handlers.


@pytest.mark.parametrize("submitted", [False, True])
@pytest.mark.parametrize("output_type", ["np", "latent"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_call_whose_callback_closes_the_generator_ends_before_its_next_step(submitted: bool, output_type: str, steps: int) -> None:
    """It ends like every other call. To finish the call, use ``close(wait=True)``. To cancel it alone, return False from the callback."""
    generator = Generator("digits")
    seen: list[int] = []

    def callback(closing: Generator, step: int, *_: object) -> None:
        seen.append(step)
        closing.close()

    arguments: dict[str, Any] = {"seed": 2, "num_inference_steps": steps, "output_type": output_type, "callback_on_step_end": callback}
    with pytest.raises(GeneratorClosedError, match="closed while this call ran"):
        generator.submit(**arguments).result(TIMEOUT_S) if submitted else generator(**arguments)
    assert seen == [0]


@pytest.mark.parametrize("submitted", [False, True])
def test_a_call_whose_callback_closes_with_wait_is_finished(submitted: bool) -> None:
    generator = Generator("digits")
    expected = generator(seed=2, output_type="np").array
    arguments: dict[str, Any] = {"seed": 2, "output_type": "np", "callback_on_step_end": lambda closing, *_: closing.close(wait=True)}
    samples = generator.submit(**arguments).result(TIMEOUT_S) if submitted else generator(**arguments)
    np.testing.assert_array_equal(samples.array, expected)


def test_closing_does_not_wait_for_a_callback_that_waits_for_the_closing_thread(digits: Generator) -> None:
    """For example, the thread of a user interface closes the Generator while a callback waits to show progress in that thread."""
    entered, closed = threading.Event(), threading.Event()

    def callback(*_: object) -> None:
        entered.set()
        assert closed.wait(TIMEOUT_S)

    future = digits.submit(seed=1, callback_on_step_end=callback)
    assert entered.wait(TIMEOUT_S)
    digits.close()
    closed.set()
    assert isinstance(future.exception(TIMEOUT_S), GeneratorClosedError)


def test_a_signal_handler_may_close_the_generator_that_it_interrupts(digits: Generator) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def callback(*_: object) -> None:
        signal.pthread_kill(main, signal.SIGALRM)

    previous = signal.signal(signal.SIGALRM, lambda *_: digits.close())
    try:
        with pytest.raises(GeneratorClosedError):
            digits(seed=1, timesteps=[1.5 - i / 1000 for i in range(1000)], callback_on_step_end=callback)
    finally:
        signal.signal(signal.SIGALRM, previous)


# ----------------------------------------------------------------------------
# Memory.


def traceback_text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def test_tracebacks_of_many_rejected_requests_stay_small() -> None:
    generator = Generator("digits")
    with scheduler_blocked(generator):
        futures = [generator.submit(seed=1, num_inference_steps=1) for _ in range(2000)]
        generator.close()
    errors = []
    for future in futures:
        with pytest.raises(GeneratorClosedError) as caught:
            future.result(TIMEOUT_S)
        errors.append(caught.value)
    assert len({id(error) for error in errors}) == 2000
    assert max(len(traceback_text(error)) for error in errors) < 4000


def test_errors_of_terminated_requests_do_not_keep_sessions_alive(slow_bundle: Path) -> None:
    generator = Generator(slow_bundle, threads=1)
    session = weakref.ref(engine_of(generator).graphs().noise)
    step_started = step_started_event(engine_of(generator))
    futures = [generator.submit(**LONG_LOOP) for _ in range(3)]
    assert step_started.wait(TIMEOUT_S)
    generator.close()
    del generator
    gc.collect()
    assert session() is None
    assert all(isinstance(future.exception(0), GeneratorClosedError) for future in futures)
