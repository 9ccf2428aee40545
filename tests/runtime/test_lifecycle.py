"""Generators with several threads and processes: sharing, closing, forking, interrupts, and the end of the process."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import os
import pickle
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scheduler_control import TIMEOUT_S, engine_of, scheduler_blocked, scheduler_threads, wait_until
from scm_runtime import DevicePool, ForkedError, GenerationCancelledError, Generator, GeneratorClosedError, Samples
from support import run, run_python


@pytest.fixture
def digits() -> Iterator[Generator]:
    with Generator("digits") as generator:
        yield generator


def check_works(generator: Generator) -> None:
    """Assert that ``submit`` and a call still return the same samples."""
    np.testing.assert_array_equal(generator.submit(seed=1, output_type="np").result(TIMEOUT_S).array, generator(seed=1, output_type="np").array)


# ----------------------------------------------------------------------------
# Threads.


def test_many_threads_share_one_generator(digits: Generator) -> None:
    expected = [digits(seed=seed, output_type="np").array for seed in range(8)]

    def sample(i: int) -> None:
        seed = i % 8
        if i % 3 == 0:
            samples = digits(seed=seed, output_type="np")
        elif i % 3 == 1:
            samples = digits.submit(seed=seed, output_type="np").result(TIMEOUT_S)
        else:
            samples = asyncio.run(digits.async_(seed=seed, output_type="np"))
        np.testing.assert_array_equal(samples.array, expected[seed])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sample, range(96)))


def test_closing_a_generator_ends_its_scheduler_thread() -> None:
    before = set(scheduler_threads())
    with Generator("digits") as generator:
        check_works(generator)
        assert set(scheduler_threads()) - before
    wait_until(lambda: set(scheduler_threads()) <= before)


def test_collecting_an_open_generator_ends_its_scheduler_thread() -> None:
    before = set(scheduler_threads())
    generator = Generator("digits")
    check_works(generator)
    assert set(scheduler_threads()) - before
    del generator
    gc.collect()
    wait_until(lambda: set(scheduler_threads()) <= before)


@pytest.mark.parametrize("closed", [True, False])
def test_memory_is_freed_without_the_garbage_collector(closed: bool) -> None:
    """The collector would run late, because it sees a few small objects and not the gigabytes that they hold."""
    generator = Generator("digits")
    session = weakref.ref(engine_of(generator).graphs().step)

    def raise_error(*_: object) -> None:
        raise KeyError

    check_works(generator)
    failed = generator.submit(seed=1, callback_on_step_end=raise_error)
    assert isinstance(failed.exception(TIMEOUT_S), KeyError)
    with pytest.raises(KeyError):
        generator(seed=1, callback_on_step_end=raise_error)
    gc.disable()
    try:
        del failed
        if closed:
            generator.close()
        else:
            del generator
        wait_until(lambda: session() is None)
    finally:
        gc.enable()


def test_a_submitted_request_is_computed_after_the_generator_is_deleted() -> None:
    generator = Generator("digits")
    expected = generator(seed=3, output_type="np").array
    with scheduler_blocked(generator):
        future = generator.submit(seed=3, output_type="np")
        del generator
        gc.collect()
    np.testing.assert_array_equal(future.result(TIMEOUT_S).array, expected)


# ----------------------------------------------------------------------------
# Closing.


def test_a_closed_generator_raises() -> None:
    generator = Generator("digits")
    generator.close()
    generator.close()
    for call in (generator, generator.submit, generator.warmup, lambda: generator.stream(2), lambda: asyncio.run(generator.async_())):
        with pytest.raises(GeneratorClosedError, match="closed: make a new one"):
            call()
    assert generator.info.device == "cpu"


def test_closing_rejects_waiting_requests_and_ends_running_ones() -> None:
    generator = Generator("digits")
    entered, release = threading.Event(), threading.Event()

    def callback(*_: object) -> None:
        entered.set()
        assert release.wait(TIMEOUT_S)

    running = generator.submit(seed=2, output_type="np", callback_on_step_end=callback)  # two steps
    assert entered.wait(TIMEOUT_S)
    waiting = [generator.submit(seed=seed) for seed in (3, 4)]
    generator.close()  # does not wait for the callback
    release.set()
    with pytest.raises(GeneratorClosedError, match="while this call ran"):
        running.result(TIMEOUT_S)
    for future in waiting:
        with pytest.raises(GeneratorClosedError, match="before this request's turn"):
            future.result(TIMEOUT_S)


def test_closing_rejects_a_request_that_waits_for_its_batch_to_fill() -> None:
    generator = Generator("digits", max_wait_ms=1e6)
    future = generator.submit(seed=1)
    generator.close()
    with pytest.raises(GeneratorClosedError):
        future.result(TIMEOUT_S)


def test_an_error_on_closing_the_engine_leaves_no_future_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator("digits")

    def close() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(engine_of(generator), "close", close)
    future = generator.submit(seed=1, callback_on_step_end=lambda closing, *_: closing.close(wait=True))
    assert len(future.result(TIMEOUT_S)) == 1


@pytest.mark.parametrize("submitted", [False, True])
def test_closing_from_a_callback_keeps_sessions_open_until_the_request_ends(submitted: bool, tmp_path: Path) -> None:
    generator = Generator("digits", profile_dir=tmp_path)
    generator(seed=2, output_type="np")

    def callback(closing: Generator, *_: object) -> None:
        closing.close()
        assert not (sizes := [path for path in tmp_path.iterdir() if path.stat().st_size > 1000]), f"profiles were written while a request runs: {sizes}"

    arguments: dict[str, Any] = {"seed": 2, "output_type": "np", "callback_on_step_end": callback}
    with pytest.raises(GeneratorClosedError, match="while this call ran"):
        generator.submit(**arguments).result(TIMEOUT_S) if submitted else generator(**arguments)
    assert any("Run" in path.read_text() or "run" in path.read_text() for path in tmp_path.iterdir()), "the profile is written when the last request ends"
    with pytest.raises(GeneratorClosedError):
        generator(seed=2)


def test_closing_ends_calls_in_other_threads() -> None:
    generator = Generator("digits")
    inside = threading.Barrier(5)

    def call(_: int) -> BaseException:
        first: list[None] = []

        def callback(*_: object) -> None:
            if not first:
                first.append(None)
                inside.wait(TIMEOUT_S)  # all calls are running
                inside.wait(TIMEOUT_S)  # the generator is closed

        with pytest.raises(GeneratorClosedError, match="while this call ran") as caught:
            generator(seed=2, output_type="np", callback_on_step_end=callback)
        return caught.value

    with ThreadPoolExecutor(4) as pool:
        errors = pool.map(call, range(4))
        inside.wait(TIMEOUT_S)
        generator.close()
        inside.wait(TIMEOUT_S)
        assert len({id(error) for error in errors}) == 4
    with pytest.raises(GeneratorClosedError):
        generator(seed=2)


def test_submitting_during_close_leaves_no_future_pending() -> None:
    for _ in range(20):
        generator, start = Generator("digits", verify_integrity=False), threading.Barrier(3)
        futures: list[Future[Samples]] = []

        def submit(generator: Generator = generator, start: threading.Barrier = start, futures: list[Future[Samples]] = futures) -> None:
            start.wait(TIMEOUT_S)
            try:
                while True:
                    futures.append(generator.submit(seed=1, num_inference_steps=1, output_type="np"))
            except GeneratorClosedError:
                return

        threads = [threading.Thread(target=submit) for _ in range(2)]
        for thread in threads:
            thread.start()
        start.wait(TIMEOUT_S)
        generator.close()
        for thread in threads:
            thread.join(TIMEOUT_S)
        for future in futures:
            assert isinstance(future.exception(TIMEOUT_S), GeneratorClosedError | None)


# ----------------------------------------------------------------------------
# Callbacks and interrupts.


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_the_generator_works_after_an_error_in_a_callback(digits: Generator, error: type[BaseException]) -> None:
    def callback(*_: object) -> None:
        raise error

    with pytest.raises(error):
        digits(seed=1, callback_on_step_end=callback)
    check_works(digits)


def test_a_callback_that_returns_false_ends_the_call(digits: Generator) -> None:
    steps: list[int] = []

    def callback(_: Generator, step: int, *__: object) -> bool:
        steps.append(step)
        return False

    with pytest.raises(GenerationCancelledError, match="after step 1"):
        digits(seed=1, callback_on_step_end=callback)  # type: ignore[arg-type]  # bool for Literal[False]
    assert steps == [0]
    check_works(digits)


def test_the_generator_works_after_an_interrupt_while_waiting_for_a_future(digits: Generator) -> None:
    release, main = threading.Event(), threading.main_thread().ident
    assert main is not None

    def callback(*_: object) -> None:
        signal.pthread_kill(main, signal.SIGINT)
        assert release.wait(TIMEOUT_S)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    futures: list[Future[Samples]] = []
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the interrupt may come during submit() or result()
            futures.append(digits.submit(seed=1, num_inference_steps=1, output_type="np", callback_on_step_end=callback))
            deadline = time.monotonic() + TIMEOUT_S
            while time.monotonic() < deadline:  # a signal that comes just before Python starts to wait does not wake it
                with contextlib.suppress(TimeoutError):
                    futures[0].result(0.05)
    finally:
        signal.signal(signal.SIGINT, previous)
        release.set()
    assert len(futures[0].result(TIMEOUT_S)) == 1
    check_works(digits)


# ----------------------------------------------------------------------------
# Forks and processes.

FORK = """
import faulthandler, gc, os, sys, time
from scm_runtime import ForkedError, Generator

def in_child(child):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        child()
        os._exit(70)  # not reached
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "the child hung"

generator = Generator("digits", threads=4)
expected = generator.submit(seed=1).result(60).array.tobytes()
assert generator(seed=1).array.tobytes() == expected
"""

FORKED_CHILD = """
def child():
    for call in (lambda: generator(seed=1), lambda: generator.submit(seed=1), lambda: generator.stream(2), lambda: generator.warmup()):
        try:
            call()
        except ForkedError as error:
            assert "Make the Generator in the child" in str(error), error
        else:
            os._exit(71)
    generator.close()
    END

assert (ended := in_child(child)) == 3, ended
assert generator.submit(seed=1).result(60).array.tobytes() == generator(seed=1).array.tobytes() == expected
"""


@pytest.mark.parametrize("end", ["sys.exit(3)", "os._exit(3)", "del globals()['generator']; gc.collect(); sys.exit(3)"])
def test_a_forked_child_gets_an_error_and_can_exit(end: str) -> None:
    run_python(FORK + FORKED_CHILD.replace("END", end))


def test_forking_while_requests_run() -> None:
    run_python(
        FORK
        + """
futures = [generator.submit(seed=1) for _ in range(200)]
assert (ended := in_child(lambda: sys.exit(3))) == 3, ended
assert {future.result(60).array.tobytes() for future in futures} == {expected}
"""
    )


def test_a_forked_child_can_create_a_generator() -> None:
    run_python(
        FORK
        + """
def child():
    with Generator("digits") as new:
        sys.exit(3 if new.submit(seed=1).result(60).array.tobytes() == new(seed=1).array.tobytes() == expected else 4)

assert (ended := in_child(child)) == 3, ended
"""
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import multiprocessing
import sys
from scm_runtime import Generator

def sample(seed):
    with Generator("digits") as generator:
        return generator.submit(seed=seed, output_type="np").result(60).array.tobytes()

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with Generator("digits") as generator, context.Pool(2) as pool:
        arrays = pool.map_async(sample, range(3)).get(100)
        assert arrays == [generator(seed=seed, output_type="np").array.tobytes() for seed in range(3)]
        pool.close()
        pool.join()
"""
    )
    run([sys.executable, program, method])


def test_a_process_can_exit_while_requests_run() -> None:
    run_python(
        """
from scm_runtime import Generator

generator = Generator("digits", max_batch_size=64)
futures = [generator.submit(batch_size=64) for _ in range(100)]
futures[0].result(60)
"""
    )


def test_a_process_can_exit_while_a_stream_is_unfinished() -> None:
    run_python(
        """
from scm_runtime import Generator

stream = Generator("digits").stream(1000, 64)
next(stream)
"""
    )


def test_a_generator_cannot_be_pickled_or_copied(digits: Generator) -> None:
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"cannot be pickled: make one in each process, Generator\('.*digits"):
            attempt(digits)


def test_the_end_of_a_with_block_waits_for_requests(tiny_bundle: Path) -> None:
    with Generator(tiny_bundle, max_batch_size=1) as generate:
        futures = [generate.submit(seed=seed) for seed in range(12)]
    assert generate.closed
    assert [future.result(0).seeds for future in futures] == [(seed,) for seed in range(12)]
    with DevicePool(tiny_bundle, devices=("cpu", "cpu"), max_batch_size=1) as pool:
        futures = [pool.submit(seed=seed) for seed in range(12)]
    assert [future.result(0).seeds for future in futures] == [(seed,) for seed in range(12)]


def test_an_exception_in_a_with_block_rejects_waiting_requests(tiny_bundle: Path) -> None:
    futures = []

    def fail() -> None:
        with Generator(tiny_bundle, max_batch_size=1) as generate:
            futures.extend([generate.submit(seed=seed) for seed in range(200)])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert any(isinstance(future.exception(), GeneratorClosedError) for future in futures)


def test_close_and_wait_from_a_callback_does_not_deadlock(tiny_bundle: Path) -> None:
    generate = Generator(tiny_bundle)
    samples = generate.submit(seed=1, callback_on_step_end=lambda generator, *_: generator.close(wait=True)).result(60)
    assert samples.seeds == (1,)
    assert generate.closed


def test_the_end_of_a_with_block_does_not_wait_for_max_wait_ms(tiny_bundle: Path) -> None:
    start = time.monotonic()
    with Generator(tiny_bundle, max_wait_ms=600_000) as generate:
        future = generate.submit(seed=1)
    assert future.result(0).seeds == (1,)
    assert time.monotonic() - start < 300, "it must not wait for max_wait_ms, ten minutes"


def test_a_scheduler_thread_that_cannot_start_fails_only_that_request(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Generator(tiny_bundle) as generate:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            with pytest.raises(RuntimeError, match="can't start"):
                generate.submit(seed=1)
        assert generate.submit(seed=1).result(60).seeds == (1,)
    assert generate._loop.resource is None, "all resources are released"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_streams_and_pools_raise_in_a_forked_child_instead_of_waiting(tiny_bundle: Path) -> None:
    pool = DevicePool(tiny_bundle, devices=("cpu",))
    generate = pool.generators[0]
    hold = threading.Event()
    stream = generate.stream(4, 2, callback_on_step_end=lambda *_: (hold.wait(60), None)[1])
    started = threading.Thread(target=lambda: next(stream))
    started.start()
    while not len(generate._scheduler._queue):
        time.sleep(0.001)
    pool._lock.acquire()
    child = os.fork()
    if not child:
        signal.alarm(60)
        caught = 0
        for use in (lambda: pool(seed=1), lambda: pool.submit(seed=1), lambda: list(pool.stream(2))):
            try:
                use()
            except ForkedError:
                caught += 1
        os._exit(caught)
    pool._lock.release()
    hold.set()
    started.join()
    stream.close()
    pool.close()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_stream_that_was_started_before_a_fork(tiny_bundle: Path) -> None:
    hold, calls = threading.Event(), []

    def wait(_generator: Generator, step: int, _t: float, _values: object) -> None:
        calls.append(step)
        if len(calls) > 2:  # in the second batch
            hold.wait(TIMEOUT_S)

    with Generator(tiny_bundle, max_batch_size=2) as generate:
        stream = generate.stream(4, 2, seed=5, callback_on_step_end=wait)
        assert next(stream).seeds == (5, 6)
        child = os.fork()
        if not child:
            signal.alarm(60)
            try:
                next(stream)
            except ForkedError:
                os._exit(42)
            os._exit(0)
        hold.set()
        assert next(stream).seeds == (7, 8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
