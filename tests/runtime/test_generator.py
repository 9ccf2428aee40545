"""Calls of a Generator: seeds, conditioning, times, outputs, callbacks, threads. Its results equal a plain loop over the bundle's graphs."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from scm_runtime import Generator, InferenceError, InvalidArgumentError, Samples
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.inputs.arguments import Labels
from scm_runtime.ort import open_session

onnxruntime = load_onnxruntime()

SEEDS = (11, 5, 2**62, -3, 0, 2**33 + 1, 7)


def pixels(samples: Samples) -> NDArray[np.uint8]:
    assert samples.array.dtype == np.uint8
    return samples.array


def open_graph(bundle: Path, name: str) -> Any:
    return onnxruntime.InferenceSession(bundle / name, providers=["CPUExecutionProvider"])


# ----------------------------------------------------------------------------
# Seeds.


def test_same_seed_same_image_in_any_batch_and_order(tiny: Generator) -> None:
    batch = pixels(tiny(seed=SEEDS, output_type="np"))
    reverse = pixels(tiny(seed=SEEDS[::-1], output_type="np"))
    np.testing.assert_array_equal(reverse, batch[::-1])
    for seed, image in zip(SEEDS, batch, strict=True):
        np.testing.assert_array_equal(pixels(tiny(seed=seed, output_type="np"))[0], image, err_msg=f"seed {seed} alone")
    assert len({image.tobytes() for image in batch}) == len(SEEDS), "different seeds must give different images"


def test_one_seed_is_incremented_over_the_batch(tiny: Generator) -> None:
    samples = tiny([3, 1, 2], seed=7, output_type="np")
    assert samples.seeds == (7, 8, 9)
    np.testing.assert_array_equal(samples.array, tiny([3, 1, 2], seed=[7, 8, 9], output_type="np").array)


def test_random_seeds_are_reported_and_reproduce_the_samples(tiny: Generator) -> None:
    samples = tiny(batch_size=3, output_type="np")
    again = tiny(seed=samples.seeds, output_type="np")
    assert len(samples.seeds) == 3
    assert again.seeds == samples.seeds
    np.testing.assert_array_equal(again.array, samples.array)
    assert tiny(output_type="np").seeds != tiny(output_type="np").seeds, "two calls without a seed must use different seeds"


@pytest.mark.parametrize("seed", [np.int64(7), [7], (7,), np.array([7], np.int32)], ids=repr)
def test_seeds_of_every_integer_type(tiny: Generator, seed: Any) -> None:
    samples = tiny(seed=seed, output_type="np")
    assert samples.seeds == (7,)
    np.testing.assert_array_equal(samples.array, tiny(seed=7, output_type="np").array)


# ----------------------------------------------------------------------------
# Conditioning.


def test_labels_by_name_equal_labels_by_index(tiny: Generator) -> None:
    by_index = tiny([2, 0, 3], seed=1, output_type="np")
    same: tuple[Labels, ...] = (["cat", "ant", "dog"], ["cat", 0, "dog"], np.array([2, 0, 3]))
    for labels in same:
        np.testing.assert_array_equal(tiny(labels, seed=1, output_type="np").array, by_index.array)
    assert by_index.conditioning["class_labels"].tolist() == [2, 0, 3]


def test_each_label_gives_a_different_image(tiny: Generator) -> None:
    images = tiny([0, 1, 2, 3], seed=[5, 5, 5, 5], output_type="np").array
    assert len({image.tobytes() for image in images}) == 4


def test_one_label_is_used_for_the_whole_batch(tiny: Generator) -> None:
    for label in ("bee", 1):
        samples = tiny(label, seed=1, batch_size=3, output_type="np")
        assert samples.conditioning["class_labels"].tolist() == [1, 1, 1]
        assert samples.seeds == (1, 2, 3)


def test_without_labels_the_seed_chooses_the_class(tiny: Generator) -> None:
    samples = tiny(seed=[6, -1, 3, 4], output_type="np")
    assert samples.conditioning["class_labels"].tolist() == [2, 3, 3, 0]
    np.testing.assert_array_equal(samples.array, tiny([2, 3, 3, 0], seed=[6, -1, 3, 4], output_type="np").array)


def test_a_guidance_scale_for_a_bundle_without_one(tiny: Generator) -> None:
    with pytest.raises(InvalidArgumentError, match=r"guidance_scale was given, but the bundle 'tiny' takes class_labels"):
        tiny(seed=0, guidance_scale=2.0)


# ----------------------------------------------------------------------------
# Times.


def test_timesteps_from_the_manifest_equal_num_inference_steps(tiny: Generator) -> None:
    for steps in (1, 2):
        counted = tiny(seed=SEEDS, num_inference_steps=steps, output_type="latent")
        timed = tiny(seed=SEEDS, timesteps=tiny.manifest.times[str(steps)][:-1], output_type="latent")
        np.testing.assert_array_equal(timed.array, counted.array)
        assert len(timed.timings.steps) == len(counted.timings.steps) == steps


def test_two_steps_are_the_default(tiny: Generator) -> None:
    default, one, two = (tiny(seed=1, output_type="np", num_inference_steps=steps).array for steps in (None, 1, 2))
    np.testing.assert_array_equal(default, two)
    assert not np.array_equal(default, one)


def test_custom_timesteps(tiny: Generator) -> None:
    largest = tiny.manifest.times["1"][0]
    samples = tiny(seed=1, timesteps=[largest, 1.2, 0.8], output_type="np")
    assert len(samples.timings.steps) == 3
    assert not np.array_equal(samples.array, tiny(seed=1, output_type="np").array)


# ----------------------------------------------------------------------------
# Latents, output types, callbacks.


def test_latents_from_the_noise_graph_give_the_same_samples(tiny: Generator, tiny_bundle: Path) -> None:
    noise = open_graph(tiny_bundle, "noise.onnx")
    (latents,) = noise.run(None, {"seeds": np.array(SEEDS, np.int64), "draw": np.array(0, np.int64), "scale": np.array(1, np.float32)})
    with_latents, without = (tiny(seed=SEEDS, latents=start, output_type="latent").array for start in (latents, None))
    np.testing.assert_array_equal(with_latents, without)


def test_latents_set_the_batch_size(tiny: Generator) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 3, 8, 8))
    assert tiny(seed=1, latents=latents, output_type="np").seeds == (1, 2)
    assert tiny(seed=1, latents=latents.tolist(), output_type="np").array.shape == (2, 8, 8, 3)


def test_output_types(tiny: Generator) -> None:
    pil, np_, latent = (tiny([1, 2], seed=3, output_type=kind) for kind in ("pil", "np", "latent"))
    for samples in (pil, np_):
        assert samples.array.dtype == np.uint8
        assert samples.array.shape == (2, 8, 8, 3)
        assert all(isinstance(image, Image.Image) and image.mode == "RGB" and image.size == (8, 8) for image in samples.images)
        np.testing.assert_array_equal(np.stack([np.asarray(image) for image in samples.images]), np_.array)
    assert latent.array.dtype == np.float32
    assert latent.array.shape == (2, 3, 8, 8)
    assert latent.timings.decode == 0
    with pytest.raises(InvalidArgumentError, match="use output_type='pil' or 'np'"):
        _ = latent.images


def test_timings_add_up(tiny: Generator) -> None:
    timings = tiny(seed=3).timings
    parts = (timings.noise, *timings.steps, timings.decode)
    assert len(timings.steps) == 2
    assert all(part > 0 for part in parts)
    assert sum(parts) <= timings.total


def test_the_callback_sees_every_step_in_order(tiny: Generator) -> None:
    calls: list[tuple[Generator, int, float, list[str], NDArray[np.float32]]] = []

    def callback(generator: Generator, step: int, t: float, values: dict[str, NDArray[np.float32]]) -> None:
        calls.append((generator, step, t, sorted(values), values["latents"].copy()))

    samples = tiny(seed=SEEDS, output_type="latent", callback_on_step_end=callback)
    assert [call[:4] for call in calls] == [(tiny, 0, tiny.manifest.times["2"][0], ["latents"]), (tiny, 1, tiny.manifest.times["2"][1], ["latents"])]
    np.testing.assert_array_equal(calls[1][4], samples.array)
    assert calls[0][4].shape == samples.array.shape
    assert calls[0][4].dtype == np.float32


def test_the_callback_replaces_latents(tiny: Generator) -> None:
    other = {0: np.full((1, 3, 8, 8), 0.25, np.float64), 1: np.full((1, 3, 8, 8), -0.5, np.float32)}

    def last(_generator: Generator, step: int, _t: float, _values: Mapping[str, object]) -> dict[str, object]:
        return {"latents": other[step]} if step == 1 else {}

    def first(_generator: Generator, step: int, _t: float, _values: Mapping[str, object]) -> dict[str, object] | None:
        return {"latents": other[step]} if step == 0 else None

    np.testing.assert_array_equal(tiny(seed=1, output_type="latent", callback_on_step_end=last).array, other[1])
    replaced, plain = (tiny(seed=1, output_type="latent", callback_on_step_end=callback).array for callback in (first, None))
    assert not np.array_equal(replaced, plain)


@pytest.mark.parametrize(
    "returned",
    [
        {"latents": np.zeros((1, 3, 8, 9))},
        {"latents": np.zeros((2, 3, 8, 8))},
        {"latents": "x"},
        {"latents": np.full((1, 3, 8, 8), np.nan)},
        np.zeros((1, 3, 8, 8)),
        True,
    ],
    ids=["wider", "more", "text", "NaN", "array", "True"],
)
def test_invalid_return_values_of_the_callback(tiny: Generator, returned: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"callback_on_step_end must .*, got"):
        tiny(seed=1, callback_on_step_end=lambda *_: returned)


def test_the_callback_returns_an_unknown_name(tiny: Generator) -> None:
    with pytest.raises(InvalidArgumentError, match="may return 'latents', got 'latentz'"):
        tiny(seed=1, callback_on_step_end=lambda *_: {"latentz": 1})


def test_an_exception_in_the_callback_reaches_the_caller(tiny: Generator) -> None:
    class StopError(Exception):
        pass

    def callback(*_: object) -> None:
        raise StopError

    before = tiny(seed=1, output_type="np").array
    with pytest.raises(StopError):
        tiny(seed=1, callback_on_step_end=callback)
    np.testing.assert_array_equal(tiny(seed=1, output_type="np").array, before)


# ----------------------------------------------------------------------------
# Threads, closing, errors of ONNX Runtime.


def test_one_thread(tiny: Generator, tiny_bundle: Path) -> None:
    with Generator(tiny_bundle, threads=1) as generator:
        np.testing.assert_allclose(generator(seed=SEEDS, output_type="latent").array, tiny(seed=SEEDS, output_type="latent").array, atol=1e-5)


def test_several_threads_call_one_generator(tiny: Generator) -> None:
    calls = [(seed, 1 + seed % 2, ["np", "latent"][seed // 2 % 2]) for seed in range(24)]

    def sample(call: tuple[int, int, Any]) -> Samples:
        seed, steps, output_type = call
        return tiny(seed=seed, batch_size=1 + seed % 3, num_inference_steps=steps, output_type=output_type)

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(sample, calls))
    for call, samples in zip(calls, together, strict=True):
        alone = sample(call)
        assert samples.seeds == alone.seeds
        assert len(samples.timings.steps) == call[1]
        np.testing.assert_array_equal(samples.array, alone.array)


def test_a_closed_generator(tiny_bundle: Path) -> None:
    with Generator(tiny_bundle) as generator:
        generator(seed=1)
    generator.close()  # a second time, which is allowed
    with pytest.raises(InvalidArgumentError, match="closed: make a new one"):
        generator(seed=1)


def test_repr_names_the_bundle(tiny: Generator, tiny_bundle: Path) -> None:
    assert repr(tiny) == f"Generator('{tiny_bundle}', device='cpu', dtype='fp32')"


def test_a_graph_that_onnxruntime_cannot_open(tiny_bundle: Path, tmp_path: Path) -> None:
    from scm_runtime.ort.open_session import open_session

    path = tmp_path / "step.fp32.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(InferenceError, match=r"ONNX Runtime .* cannot open '.*step\.fp32\.onnx'"):
        open_session(path)
    with pytest.raises(InferenceError, match=r"'decode\.fp32\.onnx' failed: "):
        open_session(tiny_bundle / "decode.fp32.onnx")(y=np.zeros((1, 3, 8, 8), np.float32))


# ----------------------------------------------------------------------------
# Any host with ONNX Runtime gets the same images from the bundle's graphs.


def test_a_plain_loop_over_the_graphs_gives_the_same_images(tiny_bundle: Path) -> None:
    tiny = Generator(tiny_bundle, native_ops=False)  # like the sessions below
    graphs = {name: open_graph(tiny_bundle, f"{name}.onnx") for name in ("noise", "step.fp32", "decode.fp32")}
    seeds, labels = np.array(SEEDS, np.int64), np.array([3, 1, 0, 2, 0, 1, 3], np.int64)

    def noise(draw: int) -> NDArray[np.float32]:
        values: NDArray[np.float32] = graphs["noise"].run(None, {"seeds": seeds, "draw": np.array(draw, np.int64), "scale": np.array(1, np.float32)})[0]
        return values

    for steps in (1, 2):
        x = noise(0) * np.float32(tiny.manifest.initial_scale)
        for k, times in enumerate(pairwise(tiny.manifest.times[str(steps)])):
            t, t_next = (np.full(len(seeds), time, np.float32) for time in times)
            (x,) = graphs["step.fp32"].run(None, {"x": x, "t": t, "t_next": t_next, "noise": noise(k + 1), "class_labels": labels})
        (image,) = graphs["decode.fp32"].run(None, {"x": x})
        np.testing.assert_array_equal(image, tiny(labels, seed=seeds, num_inference_steps=steps, output_type="np").array)
        np.testing.assert_array_equal(x, tiny(labels, seed=seeds, num_inference_steps=steps, output_type="latent").array)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_composed_sampler_graph_gives_the_same_images(tiny_bundle: Path, steps: int) -> None:
    graph = open_graph(tiny_bundle, f"sample-{steps}.fp32.onnx")
    labels = np.array([3, 1, 0, 2, 0, 1, 3], np.int64)
    (image,) = graph.run(None, {"seeds": np.array(SEEDS, np.int64), "class_labels": labels})
    assert image.dtype == np.uint8
    tiny = Generator(tiny_bundle, native_ops=False)  # like the session above
    np.testing.assert_array_equal(image, tiny(labels, seed=SEEDS, num_inference_steps=steps, output_type="np").array)


def test_a_call_is_finished_if_the_generator_closes_with_wait(tiny_bundle: Path) -> None:
    generate = Generator(tiny_bundle)
    samples = generate(seed=1, callback_on_step_end=lambda generator, *_: generator.close(wait=True))
    assert len(samples) == 1
    with pytest.raises(InvalidArgumentError, match="closed"):
        generate(seed=1)


def test_a_limit_of_threads_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("PosixThread::PosixThread pthread_create failed, error code: 11 error msg: Resource temporarily unavailable")

    monkeypatch.setattr(open_session, "_create_with_weights", fail)
    with pytest.raises(InferenceError, match="cannot start its threads") as caught:
        Generator("digits", cache_dir=False)
    assert "export" not in str(caught.value)
