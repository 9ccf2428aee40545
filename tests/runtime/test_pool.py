"""``DevicePool`` distributes work over several Generators. Here both run on the CPU."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from scheduler_control import TIMEOUT_S, record_batches, scheduler_blocked, scheduler_threads
from scm_runtime import DeviceError, DevicePool, Generator, GeneratorClosedError, InvalidArgumentError


@pytest.fixture
def pool() -> Iterator[DevicePool]:
    with DevicePool("digits", devices=("cpu", "cpu"), max_batch_size=4) as opened:
        yield opened


def test_a_pool_returns_the_same_samples_as_a_generator(pool: DevicePool) -> None:
    with Generator("digits") as generator:
        expected = generator([3, 1, 4], seed=7, output_type="np").array
    for samples in (
        pool([3, 1, 4], seed=7, output_type="np"),
        pool.submit([3, 1, 4], seed=7, output_type="np").result(TIMEOUT_S),
        asyncio.run(pool.async_([3, 1, 4], seed=7, output_type="np")),
        *pool.stream(3, 3, class_labels=[3, 1, 4], seed=7, output_type="np"),
    ):
        np.testing.assert_array_equal(samples.array, expected)


def test_a_call_goes_to_the_device_with_the_least_work(pool: DevicePool, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pool.generators
    batches = record_batches(first, monkeypatch), record_batches(second, monkeypatch)
    with scheduler_blocked(first):  # the pool does not count the blocking request
        busy = pool.submit(seed=1)  # goes to the first generator and waits there
        for seed in (2, 3, 4):
            pool(seed=seed)
    busy.result(TIMEOUT_S)
    assert {seed for batch in batches[1] for seed, _ in batch} == {2, 3, 4}


def test_idle_devices_take_turns(pool: DevicePool, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [record_batches(generator, monkeypatch) for generator in pool.generators]
    for seed in range(4):
        pool(seed=seed, num_inference_steps=1)
    assert batches == [[[(0, 0)], [(2, 0)]], [[(1, 0)], [(3, 0)]]]


def test_a_stream_uses_all_devices_and_keeps_its_order(pool: DevicePool, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = [record_batches(generator, monkeypatch) for generator in pool.generators]
    batches = list(pool.stream(23, seed=5, output_type="np"))
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 3]
    assert [seed for batch in batches for seed in batch.seeds] == list(range(5, 28))
    assert all(computed)


def test_many_threads_share_one_pool(pool: DevicePool) -> None:
    expected = [pool(seed=seed, output_type="np").array for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for i, samples in enumerate(threads.map(lambda i: pool.submit(seed=i % 4, output_type="np").result(TIMEOUT_S), range(40))):
            np.testing.assert_array_equal(samples.array, expected[i % 4])


def test_failed_requests_do_not_count_as_work(pool: DevicePool, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        with pytest.raises(InvalidArgumentError):
            pool(10)
        with pytest.raises(InvalidArgumentError):
            pool.submit(10)
        with pytest.raises(ZeroDivisionError):
            pool.submit(seed=1, callback_on_step_end=lambda *_: 1 / 0).result(TIMEOUT_S)  # type: ignore[arg-type]  # raises
    batches = [record_batches(generator, monkeypatch) for generator in pool.generators]
    for seed in range(2):
        pool(seed=seed)
    assert all(batches), "both generators must count as idle"


def test_warmup_runs_on_all_devices(pool: DevicePool, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [record_batches(generator, monkeypatch) for generator in pool.generators]
    assert pool.warmup([2]) == ()  # no CUDA graphs on a CPU
    assert all(batches)


def test_a_closed_pool_raises() -> None:
    pool = DevicePool("digits", devices=["cpu"])
    pool.close()
    pool.close()
    for call in (pool, pool.submit, lambda: pool.stream(2)):
        with pytest.raises(GeneratorClosedError):
            call()


def test_if_one_device_is_not_available_the_others_are_released() -> None:
    before = scheduler_threads()
    with pytest.raises((DeviceError, InvalidArgumentError)):
        DevicePool("digits", devices=("cpu", "cuda:97"))
    assert scheduler_threads() == before


@pytest.mark.parametrize("devices", [(), "cpu"])
def test_devices_must_be_a_nonempty_sequence(devices: str | tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgumentError, match="devices must be one device or more"):
        DevicePool("digits", devices=devices)


def test_a_pool_cannot_be_pickled(pool: DevicePool) -> None:
    for attempt in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match="cannot be pickled: make one in each process"):
            attempt(pool)
    assert repr(pool).endswith("devices=('cpu', 'cpu'))")
