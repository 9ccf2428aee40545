"""Ways to use a Generator on CUDA: each runs without a fault in the stub's log, and with CUDA graphs where they are promised."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scm_runtime import DevicePool, Generator, OutOfMemoryError
from stub.recording import Recording, new_stream

IMAGE = (28, 28, 1)


def on_gpu(**options: Any) -> Generator:
    return Generator("digits", device="cuda", **options)


def assert_replayed(generate: Generator, recording: Recording, **call: Any) -> None:
    """A repeated call launches only what its CUDA graphs contain."""
    generate(**call)
    recording.restart()
    generate(**call)
    assert generate.info.cuda_graph
    assert recording.graph_launches() > 0
    assert not [line for line in recording.lines("kernel") if line.details[0] != "replayed"]
    assert not recording.lines("capture+", "cudnn graph")


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_repeated_call_replays_cuda_graphs(dtype: Any, recording: Recording) -> None:
    with on_gpu(dtype=dtype) as generate:
        assert_replayed(generate, recording, class_labels=3, seed=1)


def test_submitted_requests_are_merged() -> None:
    with on_gpu() as generate:
        futures = [generate.submit(i % 10, seed=i) for i in range(40)]
        assert {future.result(60).array.shape for future in futures} == {(1, *IMAGE)}


def test_submitted_requests_of_different_sizes_and_steps() -> None:
    with on_gpu(dtype="fp32") as generate:
        futures = [generate.submit([i % 10] * (1 + i % 3), seed=i, num_inference_steps=1 + i % 2) for i in range(40)]
        assert [len(future.result(60).array) for future in futures] == [1 + i % 3 for i in range(40)]


def test_calls_of_an_event_loop() -> None:
    async def gathered() -> list[Any]:
        with on_gpu() as generate:
            return await asyncio.gather(*(generate.async_(3, seed=i) for i in range(16)))

    assert len(asyncio.run(gathered())) == 16


def test_a_stream_of_batches_with_a_smaller_last_one() -> None:
    with on_gpu() as generate:
        assert sum(len(batch.array) for batch in generate.stream(200, batch_size=64, seed=0)) == 200


def test_threads_share_a_generator() -> None:
    sizes = [*range(1, 13)] * 4
    with on_gpu() as generate, ThreadPoolExecutor(8) as pool:
        assert [len(array) for array in pool.map(lambda n: generate(class_labels=[1] * n, seed=0).array, sizes)] == sizes


def test_threads_share_three_generators() -> None:
    generators = [on_gpu() for _ in range(3)]
    with ThreadPoolExecutor(6) as pool:
        arrays = list(pool.map(lambda i: generators[i % 3](class_labels=[1] * (1 + i % 7), seed=0).array, range(60)))
    for generate in generators:
        generate.close()
    assert [len(array) for array in arrays] == [1 + i % 7 for i in range(60)]


def test_another_thread_opens_generators_while_graphs_are_captured() -> None:
    stop, errors = threading.Event(), list[Exception]()

    def open_and_close() -> None:
        while not stop.is_set():
            try:
                with on_gpu() as other:
                    other(class_labels=3, seed=1)
            except Exception as error:  # noqa: BLE001  # shown by the test's thread
                errors.append(error)

    thread = threading.Thread(target=open_and_close)
    thread.start()
    try:
        with on_gpu() as generate:
            for n in range(1, 9):
                generate(class_labels=[1] * n, seed=0)
            assert generate.info.cuda_graph
    finally:
        stop.set()
        thread.join()
    assert not errors


@pytest.mark.parametrize("non_blocking", [True, False])
def test_the_host_s_stream_by_its_handle(non_blocking: bool, recording: Recording) -> None:
    with on_gpu(stream=new_stream(non_blocking=non_blocking)) as generate:
        assert_replayed(generate, recording, class_labels=3, seed=1)


def test_the_host_s_stream_as_an_object(recording: Recording) -> None:
    device = import_module("cuda.core").Device(0)  # not installed where types are checked
    device.set_current()
    with on_gpu(stream=device.create_stream()) as generate:
        assert_replayed(generate, recording, class_labels=3, seed=1)


def test_the_legacy_stream_runs_without_cuda_graphs(recording: Recording) -> None:
    with on_gpu(stream=0) as generate:
        assert generate(class_labels=3, seed=1).array.shape == (1, *IMAGE)
        assert not generate.info.cuda_graph
    assert not recording.lines("capture+")


def test_a_pool_of_two_devices(recording: Recording) -> None:
    with DevicePool("digits", devices=["cuda:0", "cuda:1"]) as pool:
        assert [pool(class_labels=3, seed=i).array.shape for i in range(4)] == [(1, *IMAGE)] * 4


def test_the_cuda_provider_by_its_name() -> None:
    with Generator("digits", providers=["CUDAExecutionProvider"]) as generate:
        assert generate(class_labels=3, seed=1).array.shape == (1, *IMAGE)
        assert generate.info.device == "cuda"


def test_a_result_on_the_device_outlives_its_generator() -> None:
    with on_gpu() as generate:
        result = generate(class_labels=3, seed=1, output_type="dlpack").array
    gc.collect()
    capsule = result.__dlpack__(stream=1)
    del result
    gc.collect()
    del capsule
    gc.collect()


def test_results_on_the_device_are_exported_in_other_threads() -> None:
    def exported(generate: Generator) -> tuple[int, ...]:
        result = generate(class_labels=3, seed=1, output_type="dlpack").array
        assert result.__dlpack__(stream=-1, max_version=(1, 0)) is not None
        shape: tuple[int, ...] = result.shape
        return shape

    with on_gpu() as generate, ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: exported(generate), range(8))) == {(1, *IMAGE)}


def test_a_callback_changes_states() -> None:
    seen = []

    def halved(generator: Generator, step: int, t: float, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": tensors["latents"] * np.float32(0.5)}

    with on_gpu() as generate:
        generate(class_labels=3, seed=1, callback_on_step_end=halved)
    assert seen == [0, 1]


def test_a_memory_limit() -> None:
    with on_gpu(gpu_mem_limit=32 << 20) as generate:
        with pytest.raises(OutOfMemoryError, match="batch of 8192"):
            generate(seed=0, batch_size=8192)
        assert generate(seed=0, batch_size=4).array.shape == (4, *IMAGE)


def test_warm_up_captures(recording: Recording) -> None:
    with on_gpu() as generate:
        generate.warmup(batch_sizes=(1, 8))
        recording.restart()
        generate(class_labels=[3] * 8, seed=1)
    assert recording.graph_launches() > 0
    assert not recording.lines("capture+", "cudnn graph")


def test_a_generator_that_is_dropped_is_closed(recording: Recording) -> None:
    gc.collect()  # frees what earlier tests have left
    recording.restart()
    generate = on_gpu()
    generate(class_labels=3, seed=1)
    del generate
    gc.collect()
    made = {line.details[0].split()[0] for line in recording.lines("stream+")}
    assert made
    assert made == {line.details[0] for line in recording.lines("stream-")}


def test_the_cache_of_optimized_graphs(tmp_path: Path, recording: Recording) -> None:
    for _ in range(2):
        with on_gpu(cache_dir=tmp_path) as generate:
            assert generate.info.native_ops
            assert_replayed(generate, recording, class_labels=3, seed=1)


def test_function_bodies_in_place_of_kernels(recording: Recording) -> None:
    """The step is captured. The noise is not: ONNX Runtime has no CUDA kernels for its integer operators."""
    with on_gpu(native_ops=False) as generate:
        generate(class_labels=3, seed=1)
        recording.restart()
        generate(class_labels=3, seed=1)
        assert generate.info.cuda_graph
    assert recording.graph_launches() > 0
    assert not recording.lines("capture+", "cudnn graph")


def test_channels_last_as_the_user_s_option(recording: Recording) -> None:
    with on_gpu(provider_options={"prefer_nhwc": "1"}) as generate:
        assert_replayed(generate, recording, class_labels=3, seed=1)
