"""Non-finite samples never become black images silently.

The "fp16" graphs in these tests compute in float32 and return non-finite values for some inputs, as if half precision overflowed.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import toy_bundle
from scm_runtime import Generator, InvalidArgumentError, NonFiniteError
from scm_runtime.bundle.checksums import sha256
from scm_runtime.bundle.manifest import MANIFEST, FileEntry, read_manifest

SEEDS = [3, 4, 5, 6]
EMBEDS = np.random.default_rng(0).standard_normal((4, 3, toy_bundle.WIDTH), np.float32)
FINITE, OVERFLOW = 4.5, 66.0  # guidance scales

# In the step from t = 1, a sample with a guidance scale above 65 becomes {value}.
PLANTED_VALUE = """
    limit = Constant<value_float=65.0>()
    over = Greater(guidance_scale, limit)
    late = Constant<value_float=1.2>()
    second = Less(t, late)
    both = And(over, second)
    value = Constant<value_float={value}>()
    none = Constant<value_float=0.0>()
    planted = Where(both, value, none)
    planted4 = Reshape(planted, one)
    x_next = Add(whole, planted4)
}}"""


def step_with(value: str) -> str:
    """Return the step graph with a planted value."""
    body = toy_bundle.STEP.replace("x_next = Add(abcd, gt4)", "whole = Add(abcd, gt4)")
    return body.rstrip().removesuffix("}") + PLANTED_VALUE.format(value=value)


# Images of samples with a value above 9 are black.
BLACK_DECODE = toy_bundle.DECODE.replace(
    "pixels = Cast<to=2>(clipped)",
    """
    axes = Constant<value_ints=[1, 2, 3]>()
    most = ReduceMax<keepdims=1>(x, axes)
    limit = Constant<value_float=9.0>()
    over = Greater(most, limit)
    kept = Where(over, low, clipped)
    pixels = Cast<to=2>(kept)""",
)


@pytest.fixture
def write_bundle(tmp_path: Path) -> Any:
    """A function that writes a bundle with fp32 and fp16 graphs. The fp16 step has a planted value."""

    def write(*, value: str = "nan", decode: str = toy_bundle.DECODE) -> Path:
        folder = toy_bundle.write_text_bundle(tmp_path / "half.scm")
        for graph, text in {"step": step_with(value), "decode": decode}.items():
            model = onnx.parser.parse_model(toy_bundle.HEADER + text)
            if graph == "step":
                model.graph.initializer.append(toy_bundle.external_tensor("weights", [toy_bundle.WIDTH, 2]))
            (folder / f"{graph}.fp16.onnx").write_bytes(model.SerializeToString())
        manifest = read_manifest(folder)
        files = {path.name: FileEntry(size=path.stat().st_size, sha256=sha256(path)) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
        (folder / MANIFEST).write_bytes(msgspec.structs.replace(manifest, dtypes=("fp32", "fp16"), files=files).to_json())
        return folder

    return write


def sample(generate: Generator, guidance: list[float], **arguments: Any) -> NDArray[Any]:
    samples = generate(seed=SEEDS, prompt_embeds=EMBEDS, guidance_scale=guidance, **{"output_type": "np", **arguments})
    return samples.array


def expected(guidance: list[float]) -> NDArray[np.float32]:
    """Return the latents that the float32 graphs produce."""
    return toy_bundle.sample(SEEDS, EMBEDS, guidance=guidance)


MIXED = [FINITE, OVERFLOW, FINITE, OVERFLOW]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("output_type", ["np", "pil", "latent", "dlpack"])
def test_the_error_names_step_time_dtype_seeds_and_remedy(write_bundle: Any, value: str, output_type: str) -> None:
    with Generator(write_bundle(value=value), dtype="fp16") as generate:
        with pytest.raises(
            NonFiniteError, match=r"2 of 4 samples .* after step 2 of 2 \(t = 1\) in fp16, seeds 4, 6\..*on_nonfinite='fp32'.*dtype='fp32'"
        ) as caught:
            sample(generate, MIXED, output_type=output_type)
        assert (caught.value.seeds, caught.value.step, caught.value.dtype) == ((4, 6), 1, "fp16")
        np.testing.assert_allclose(sample(generate, [FINITE] * 4, output_type="latent"), expected([FINITE] * 4), atol=1e-5)


def test_fp32_computes_the_nonfinite_samples_again(write_bundle: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "scm_runtime")
    with Generator(write_bundle(), dtype="fp16", on_nonfinite="fp32") as generate:
        np.testing.assert_allclose(sample(generate, MIXED, output_type="latent"), expected(MIXED), rtol=1e-6, atol=1e-5)
        np.testing.assert_array_equal(sample(generate, MIXED), toy_bundle.decode(expected(MIXED)))
    assert "Computed again in fp32" in caplog.text


def test_fp32_continues_from_latents_returned_by_a_callback(write_bundle: Any) -> None:
    replacement = np.random.default_rng(1).standard_normal((4, *toy_bundle.SAMPLE_SHAPE), np.float32)

    def callback(_generator: Generator, step: int, _t: float, _values: object) -> dict[str, Any] | None:
        return {"latents": replacement} if step == 0 else None

    folder = write_bundle()
    with Generator(folder) as generate, Generator(folder, dtype="fp16", on_nonfinite="fp32") as half:
        whole = sample(generate, MIXED, output_type="latent", callback_on_step_end=callback)
        np.testing.assert_array_equal(sample(half, MIXED, output_type="latent", callback_on_step_end=callback), whole)


def test_fp32_starts_from_given_latents(write_bundle: Any) -> None:
    latents = np.random.default_rng(2).standard_normal((4, *toy_bundle.SAMPLE_SHAPE), np.float32)
    folder = write_bundle()
    with Generator(folder) as whole, Generator(folder, dtype="fp16", on_nonfinite="fp32") as half:
        np.testing.assert_array_equal(sample(half, MIXED, latents=latents, output_type="latent"), sample(whole, MIXED, latents=latents, output_type="latent"))


def test_warn_logs_once_per_call_and_continues(write_bundle: Any, caplog: pytest.LogCaptureFixture) -> None:
    with Generator(write_bundle(), dtype="fp16", on_nonfinite="warn") as generate:
        latents = sample(generate, MIXED, output_type="latent")
    assert np.isfinite(latents).reshape(4, -1).all(axis=1).tolist() == [True, False, True, False]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "seeds 4, 6" in caplog.text


def test_nonfinite_samples_in_fp32_raise_under_every_policy_except_warn(write_bundle: Any) -> None:
    folder = toy_bundle.write_text_bundle(write_bundle().parent / "wild.scm", gain=1e38)
    for policy in ("raise", "fp32"):
        with (
            Generator(folder, on_nonfinite=cast(Any, policy)) as generate,
            pytest.raises(NonFiniteError, match=r"after step 1 of 2 .* in fp32, seeds 3, 4, 5, 6\. .*checkpoint"),
        ):
            sample(generate, [1e3] * 4)


def test_black_images_of_a_half_precision_decoder(write_bundle: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_bundle(value="0.0", decode=BLACK_DECODE)
    bright = [60.0] * 4
    black = [seed for seed, x in zip(SEEDS, expected(bright), strict=True) if x.max() > 9]
    assert 0 < len(black) < 4, "some images must be black and some not"
    whole = toy_bundle.decode(expected(bright))
    with Generator(folder, dtype="fp16") as generate, pytest.raises(NonFiniteError, match="decoder overflowed in fp16 and made black images") as caught:
        sample(generate, bright)
    assert caught.value.seeds == tuple(black)
    with Generator(folder, dtype="fp16", on_nonfinite="fp32") as generate:
        np.testing.assert_array_equal(sample(generate, bright), whole)
    with Generator(folder, dtype="fp16", on_nonfinite="warn") as generate:
        images = sample(generate, bright)
    assert [image.any() for image in images] == [image.any() and seed not in black for seed, image in zip(SEEDS, whole, strict=True)]
    assert f"seeds {', '.join(map(str, black))}." in caplog.text


def test_an_image_that_is_black_in_fp32_too_is_not_an_error(write_bundle: Any) -> None:
    dark = toy_bundle.DECODE.replace("value_float=128.0", "value_float=-900.0")
    folder = write_bundle(decode=dark)
    model = onnx.load(folder / "decode.fp16.onnx")
    (folder / "decode.fp32.onnx").write_bytes(model.SerializeToString())
    manifest = read_manifest(folder)
    entry = FileEntry(size=(folder / "decode.fp32.onnx").stat().st_size, sha256=sha256(folder / "decode.fp32.onnx"))
    (folder / MANIFEST).write_bytes(msgspec.structs.replace(manifest, files=manifest.files | {"decode.fp32.onnx": entry}).to_json())
    with Generator(folder, dtype="fp16") as generate:
        assert not sample(generate, [FINITE] * 4).any()


def test_an_unknown_policy(tiny_bundle: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"on_nonfinite must be 'raise', 'warn' or 'fp32', got 'ignore'"):
        Generator(tiny_bundle, on_nonfinite=cast(Any, "ignore"))
