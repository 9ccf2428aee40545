"""A Generator on a GPU: it matches the CPU, shares results with torch on the device, uses the caller's stream, and survives a batch that is too large.

On the stub of a GPU (tests/stub), all of this runs, and values are not compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from scm_export.verification.tolerances import MIN_PSNR, SAMPLE_ATOL
from scm_runtime import Generator, InvalidArgumentError, OutOfMemoryError
from support import on_stub

pytestmark = pytest.mark.gpu

SEEDS = [1, 2, 3]
computes_in_torch = pytest.mark.skipif(on_stub(), reason="computes in torch on the device, which is a stub")


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[Generator]:
    with Generator("digits", device="cpu", dtype="fp32") as generate:
        yield generate


def on_gpu(dtype: Any = "fp32", **options: Any) -> Generator:
    return Generator("digits", device="cuda", dtype=dtype, **options)


def assert_equal(ours: Any, theirs: Any) -> None:
    assert ours.shape == theirs.shape
    if not on_stub():
        np.testing.assert_array_equal(ours, theirs)


def assert_close(ours: Any, theirs: Any, atol: float) -> None:
    assert ours.shape == theirs.shape
    assert on_stub() or np.abs(ours - theirs).max() <= atol


def psnr(ours: Any, theirs: Any) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((ours.astype(float) - theirs.astype(float)) ** 2), 1e-10)))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("native_ops", [False, "auto"])
def test_samples_match_the_cpu(on_cpu: Generator, steps: int, dtype: str, cuda_graph: bool, native_ops: Any) -> None:
    expected = on_cpu(seed=SEEDS, num_inference_steps=steps, output_type="latent").array
    pixels = on_cpu(seed=SEEDS, num_inference_steps=steps, output_type="np").array
    with on_gpu(dtype, cuda_graph=cuda_graph, native_ops=native_ops) as generate:
        for _ in range(2):  # captured, then replayed
            drawn = generate(seed=SEEDS, num_inference_steps=steps, output_type="latent").array
            assert_close(drawn, expected, SAMPLE_ATOL[dtype, "fp32" if dtype == "fp32" else "fp16"])
            painted = generate(seed=SEEDS, num_inference_steps=steps, output_type="np").array
            assert painted.shape == pixels.shape
            assert on_stub() or psnr(painted, pixels) >= MIN_PSNR


def test_the_same_pixels_with_cuda_graphs_and_without() -> None:
    with on_gpu(cuda_graph=True) as captured, on_gpu(cuda_graph=False) as plain:
        for seeds in ([1], [1, 2], [3], [4, 5]):  # each shape is captured, and replayed with other seeds
            assert_equal(captured(seed=seeds, output_type="np").array, plain(seed=seeds, output_type="np").array)


def test_many_batch_sizes() -> None:
    """More batch sizes than are captured, and than buffers are kept for."""
    with on_gpu() as generate:
        alone = np.concatenate([generate(seed=seed, output_type="np").array for seed in range(20)])
        for n in [*range(1, 21), 3, 20, 1]:
            batch = generate(seed=0, batch_size=n, class_labels=[seed % 10 for seed in range(n)], output_type="np").array
            assert_close(batch.astype(int), alone[:n].astype(int), 2)


@computes_in_torch
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3])
def test_noise_matches_torch_on_cuda(seed: int) -> None:
    with on_gpu() as generate:
        shape = (1, *generate.manifest.sample.shape)
        drawn = torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").cpu().numpy()
        ours = generate(class_labels=3, seed=seed, output_type="latent").array
        theirs = generate(class_labels=3, seed=seed, latents=drawn, output_type="latent").array
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("side_stream", [False, True])
def test_torch_imports_results_on_the_device(side_stream: bool) -> None:
    stream = torch.cuda.Stream() if side_stream else torch.cuda.default_stream()
    with on_gpu() as generate:
        expected = torch.from_numpy(generate(seed=SEEDS, output_type="np").array)
        with torch.cuda.stream(stream):
            for _ in range(10):
                tensor = from_dlpack(generate(seed=SEEDS, output_type="dlpack").array)
                assert tensor.device == torch.device("cuda:0")
                assert_equal(tensor.cpu().numpy(), expected.numpy())
        kept = from_dlpack(generate(seed=SEEDS, output_type="dlpack").array)
        for seed in range(10):  # later results do not overwrite it
            generate(seed=[seed, seed, seed], output_type="dlpack")
    assert_equal(kept.cpu().numpy(), expected.numpy())  # after the Generator is closed


@computes_in_torch
@pytest.mark.parametrize("which", ["side", "default"])
def test_work_is_ordered_on_the_callers_stream(which: str) -> None:
    with on_gpu() as generate:
        expected = torch.from_numpy(generate(seed=SEEDS, output_type="np").array).int()
    stream = torch.cuda.Stream() if which == "side" else torch.cuda.default_stream()
    with on_gpu(stream=stream) as generate, torch.cuda.stream(stream):
        for _ in range(3):
            busy = torch.ones(4096, 4096, device="cuda")
            for _ in range(20):
                busy = busy @ busy / 4096
            tensor = from_dlpack(generate(seed=SEEDS, output_type="dlpack").array)
            assert torch.equal((tensor.int() + busy[0, 0].int() * 0).cpu(), expected)


def test_a_stream_of_another_device_is_rejected() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with pytest.raises(InvalidArgumentError, match="cuda:1"):
        on_gpu(stream=torch.cuda.Stream("cuda:1"))


def test_two_generators_run_concurrently_on_separate_streams() -> None:
    """In the first calls, one Generator captures CUDA graphs while the other allocates memory."""
    with on_gpu() as first, on_gpu() as second, ThreadPoolExecutor(4) as pool:
        futures = [(n, pool.submit(generate, seed=0, class_labels=[1] * n, output_type="np")) for n in range(1, 9) for generate in (first, second)]
        results: dict[int, list[Any]] = {}
        for n, future in futures:
            results.setdefault(n, []).append(future.result().array)
    for ours, theirs in results.values():
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_too_large_a_batch_leaves_a_working_generator(cuda_graph: bool) -> None:
    with on_gpu(gpu_mem_limit=64 << 20, cuda_graph=cuda_graph) as generate:
        before = generate(seed=SEEDS, output_type="np").array
        with pytest.raises(OutOfMemoryError, match="batch of 8192"):
            generate(seed=0, batch_size=8192, output_type="np")
        assert_equal(generate(seed=SEEDS, output_type="np").array, before)
        generate(seed=0, batch_size=16, output_type="np")


def test_close_frees_memory() -> None:
    def once() -> None:
        with on_gpu() as generate:
            generate(seed=0, batch_size=64, output_type="np")

    once()  # CUDA's libraries allocate memory that they keep until the process ends
    free = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        once()
    assert free - torch.cuda.mem_get_info()[0] < 32 << 20


def test_callbacks_see_and_change_states(on_cpu: Generator) -> None:
    def halved(generator: Generator, step: int, t: float, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * np.float32(0.5)}

    with on_gpu() as generate:
        ours = generate(seed=SEEDS, output_type="latent", callback_on_step_end=halved).array
    theirs = on_cpu(seed=SEEDS, output_type="latent", callback_on_step_end=halved).array
    assert_close(ours, theirs, SAMPLE_ATOL["fp32", "fp32"])


def test_timings_come_from_the_device() -> None:
    with on_gpu() as generate:
        timings = generate(seed=1, output_type="np").timings
    assert len(timings.steps) == 2
    assert all(seconds > 0 for seconds in (*timings.steps, timings.noise, timings.decode, timings.copy))
