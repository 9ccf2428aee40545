"""``close()`` while graphs run: what is in flight is terminated, each call and each future gets an error of its own, and nobody else is touched."""

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


@pytest.fixture
def digits() -> Iterator[Generator]:
    with Generator("digits") as generator:
        yield generator


def terminated(error: BaseException | None) -> GeneratorClosedError:
    """The error, once it is known to be that of a run that was terminated."""
    assert isinstance(error, GeneratorClosedError)
    assert not isinstance(error, InferenceError)
    assert "terminate" in str(error.__cause__)
    return error


def in_thread(call: Callable[[], object]) -> Future[object]:
    """Called in a thread that does not hold up the end of the tests."""
    future: Future[object] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


# ----------------------------------------------------------------------------
# What runs.


def test_closing_terminates_the_step_and_refuses_what_waits(slow: Generator) -> None:
    before, stepped = set(scheduler_threads()), step_started_event(engine_of(slow))
    running = slow.submit(**LONG_LOOP)
    assert stepped.wait(TIMEOUT_S)
    waiting = [slow.submit(**FAST) for _ in range(3)]
    slow.close()
    assert all(future.done() for future in (running, *waiting))
    assert set(scheduler_threads()) <= before, "the thread has ended when close() returns"
    terminated(running.exception())
    errors = [future.exception() for future in waiting]
    assert all(isinstance(error, GeneratorClosedError) for error in errors)
    assert len({id(error) for error in errors}) == 3


def test_requests_that_share_a_step_get_an_error_each(slow: Generator) -> None:
    stepped = step_started_event(engine_of(slow))
    with scheduler_blocked(slow, prompt_embeds=EMBEDS):
        stepped.clear()
        futures = [slow.submit(**LONG_LOOP) for _ in range(4)]
    assert stepped.wait(TIMEOUT_S)
    slow.close()
    assert len({id(terminated(future.exception(TIMEOUT_S))) for future in futures}) == 4


def test_closing_terminates_the_calls_of_other_threads(slow: Generator) -> None:
    stepped = step_started_event(engine_of(slow))
    called = in_thread(lambda: slow(**LONG_LOOP))
    assert stepped.wait(TIMEOUT_S)
    slow.close()
    terminated(called.exception(TIMEOUT_S))


def test_an_exception_that_ends_a_with_block_terminates_what_runs(slow_bundle: Path) -> None:
    futures = []

    def fail() -> None:
        with Generator(slow_bundle, threads=1) as generator:
            stepped = step_started_event(engine_of(generator))
            futures.append(generator.submit(**LONG_LOOP))
            assert stepped.wait(TIMEOUT_S)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    terminated(futures[0].exception(0))


def test_closing_a_pool_terminates_the_runs_of_all_its_devices(slow_bundle: Path) -> None:
    pool = DevicePool(slow_bundle, devices=("cpu", "cpu"), threads=1)
    steps = [step_started_event(engine_of(generator)) for generator in pool.generators]
    futures = [pool.submit(**LONG_LOOP) for _ in range(2)]
    assert all(stepped.wait(TIMEOUT_S) for stepped in steps)
    pool.close()
    for future in futures:
        terminated(future.exception(0))


def test_closing_while_another_thread_waits_for_the_end_terminates_too(slow: Generator) -> None:
    stepped = step_started_event(engine_of(slow))
    running = slow.submit(**LONG_LOOP)
    assert stepped.wait(TIMEOUT_S)
    waiting = in_thread(lambda: slow.close(wait=True))
    slow.close()
    terminated(running.exception(0))
    waiting.result(TIMEOUT_S)


@pytest.mark.parametrize("submitted", [False, True])
def test_closing_terminates_the_steps_that_are_done_again_in_fp32(submitted: bool, slow_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the engine's own steps come out infinite, and those in fp32 take minutes."""
    stepped: list[threading.Event] = []
    open_once = NonFiniteHandler._open_fp32_once

    def opened(guard: NonFiniteHandler) -> Any:
        first, engine = guard._fp32 is None, open_once(guard)
        if first:
            stepped.append(step_started_event(engine))
            begun.set()
        return engine

    def overflow(trajectories: Sequence[Trajectory]) -> None:
        for one in trajectories:
            one.state.finite = [np.array([False])]

    begun = threading.Event()
    monkeypatch.setattr(NonFiniteHandler, "_open_fp32_once", opened)
    with Generator(slow_bundle, threads=1, on_nonfinite="fp32") as generator:
        engine = engine_of(generator)
        monkeypatch.setattr(engine, "dtype", "fp16")
        monkeypatch.setattr(engine, "step", overflow)
        call = generator.submit(**LONG_LOOP) if submitted else in_thread(lambda: generator(**LONG_LOOP))
        assert begun.wait(TIMEOUT_S)
        assert stepped[0].wait(TIMEOUT_S)
        generator.close()
        terminated(call.exception(TIMEOUT_S))


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
    terminated(called.exception(TIMEOUT_S))


# ----------------------------------------------------------------------------
# Whom it does not touch.


def test_other_generators_go_on(slow_bundle: Path, slow: Generator) -> None:
    with Generator(slow_bundle, threads=1) as other:
        steps = [step_started_event(engine_of(slow)), step_started_event(engine_of(other))]
        ended, finished = slow.submit(**LONG_LOOP), other.submit(**LONG_OPERATOR)
        assert all(stepped.wait(TIMEOUT_S) for stepped in steps)
        slow.close()
        terminated(ended.exception(0))
        np.testing.assert_allclose(finished.result(TIMEOUT_S).array, expected(), atol=1e-5)


def expected() -> Any:
    return toy_bundle.sample([1], EMBEDS, score=toy_bundle.SLOW_SCORE, steps=1)


def test_another_generator_over_the_same_cache_works_after_a_termination(slow_bundle: Path, tmp_path: Path) -> None:
    for _ in range(2):
        generator = Generator(slow_bundle, threads=1, cache_dir=tmp_path)
        np.testing.assert_allclose(generator(**FAST).array, toy_bundle.sample([1], EMBEDS), atol=1e-6)
        stepped = step_started_event(engine_of(generator))
        future = generator.submit(**LONG_LOOP)
        assert stepped.wait(TIMEOUT_S)
        generator.close()
        terminated(future.exception(0))


# ----------------------------------------------------------------------------
# Who closes.


@pytest.mark.parametrize("submitted", [False, True])
@pytest.mark.parametrize("output_type", ["np", "latent"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_call_that_closes_its_own_generator_ends_before_its_next_step(submitted: bool, output_type: str, steps: int) -> None:
    """As any other call does. ``close(wait=True)``, or False from the callback, is for those that mean something else."""
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
def test_a_call_whose_callback_closes_and_waits_is_finished(submitted: bool) -> None:
    generator = Generator("digits")
    expected = generator(seed=2, output_type="np").array
    arguments: dict[str, Any] = {"seed": 2, "output_type": "np", "callback_on_step_end": lambda closing, *_: closing.close(wait=True)}
    samples = generator.submit(**arguments).result(TIMEOUT_S) if submitted else generator(**arguments)
    np.testing.assert_array_equal(samples.array, expected)


def test_closing_does_not_wait_for_a_callback_that_waits_for_whoever_closes(digits: Generator) -> None:
    """As where a user interface's thread closes, and the callback shows its progress there."""
    entered, closed = threading.Event(), threading.Event()

    def callback(*_: object) -> None:
        entered.set()
        assert closed.wait(TIMEOUT_S)

    future = digits.submit(seed=1, callback_on_step_end=callback)
    assert entered.wait(TIMEOUT_S)
    digits.close()
    closed.set()
    assert isinstance(future.exception(TIMEOUT_S), GeneratorClosedError)


def test_a_signal_handler_may_close_what_it_interrupts(digits: Generator) -> None:
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
# What is left behind.


def text_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def test_the_errors_of_many_refused_requests_stay_small() -> None:
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
    assert max(len(text_of(error)) for error in errors) < 4000


def test_the_errors_of_terminated_requests_keep_no_memory(slow_bundle: Path) -> None:
    generator = Generator(slow_bundle, threads=1)
    session = weakref.ref(engine_of(generator).graphs().noise)
    stepped = step_started_event(engine_of(generator))
    futures = [generator.submit(**LONG_LOOP) for _ in range(3)]
    assert stepped.wait(TIMEOUT_S)
    generator.close()
    del generator
    gc.collect()
    assert session() is None
    assert all(isinstance(future.exception(0), GeneratorClosedError) for future in futures)
