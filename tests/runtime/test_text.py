"""Text-to-image models: embeddings and masks of dynamic length, an encoder, previews, and bundles without a decoder, with the toy bundle."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

import toy_bundle
from scm_runtime import Generator, InferenceError, InvalidArgumentError
from scm_runtime.bundle.checksums import sha256
from scm_runtime.bundle.manifest import MANIFEST, FileEntry, read_manifest
from scm_runtime.cli import main
from scm_runtime.ort import session
from scm_runtime.ort.open_session import open_session
from scm_runtime.samples import grid
from support import tree

SEEDS = (7, 8, 9)
RNG = np.random.default_rng(0)
EMBEDS = RNG.standard_normal((3, 7, toy_bundle.WIDTH)).astype(np.float32)
MASK = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_bundle.write_text_bundle(tmp_path_factory.mktemp("text") / "text.scm")


@pytest.fixture(scope="module")
def text(bundle: Path) -> Generator:
    return Generator(bundle)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without decoder, encoder or preview decoder."""
    return toy_bundle.write_text_bundle(tmp_path_factory.mktemp("plain") / "plain.scm", decoder=False, extras=(), name="plain")


def call(*arguments: str | Path) -> Result:
    return CliRunner(catch_exceptions=False).invoke(main, [str(argument) for argument in arguments])


def latents(generator: Generator, **arguments: Any) -> NDArray[np.float32]:
    array: NDArray[np.float32] = generator(seed=SEEDS, output_type="latent", **arguments).array
    return array


# ----------------------------------------------------------------------------
# Embeddings and masks.


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_embeddings_of_any_length(text: Generator, tokens: int) -> None:
    embeds = np.random.default_rng(tokens).standard_normal((3, tokens, toy_bundle.WIDTH)).astype(np.float32)
    np.testing.assert_allclose(latents(text, prompt_embeds=embeds), toy_bundle.sample(SEEDS, embeds), atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
def test_pictures_of_a_text(text: Generator, steps: int) -> None:
    samples = text(seed=7, prompt_embeds=EMBEDS, prompt_attention_mask=MASK, guidance_scale=[1, 2, 3], num_inference_steps=steps)
    expected = toy_bundle.decode(toy_bundle.sample(SEEDS, EMBEDS, MASK, [1, 2, 3], steps=steps))
    np.testing.assert_array_equal(samples.array, expected)
    assert samples.seeds == SEEDS, "the embeddings set the batch size"
    assert len(samples.images) == 3
    np.testing.assert_array_equal(samples.conditioning["prompt_attention_mask"], MASK)


def test_one_embedding_serves_all_samples(text: Generator) -> None:
    for mask in (None, MASK, MASK[1]):
        given = latents(text, prompt_embeds=EMBEDS[0], prompt_attention_mask=mask)
        np.testing.assert_allclose(given, toy_bundle.sample(SEEDS, EMBEDS[0], mask), atol=1e-5)
    alone = text(prompt_embeds=EMBEDS[0], seed=8, output_type="latent")
    np.testing.assert_allclose(alone.array, toy_bundle.sample([8], EMBEDS[0]), atol=1e-5)


def test_the_mask_counts_every_token_by_default(text: Generator) -> None:
    default, ones, some = (latents(text, prompt_embeds=EMBEDS, prompt_attention_mask=mask) for mask in (None, np.ones(7), MASK))
    np.testing.assert_array_equal(default, ones)
    assert not np.allclose(default[1:], some[1:], atol=1e-3)


def test_masked_tokens_do_not_matter(text: Generator) -> None:
    other = np.where(MASK[..., None] == 1, EMBEDS, np.float32(100))
    first, second = (latents(text, prompt_embeds=embeds, prompt_attention_mask=MASK) for embeds in (EMBEDS, other))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_embeddings_of_other_dtypes(text: Generator, dtype: type) -> None:
    given: NDArray[Any] = EMBEDS.astype(dtype)
    np.testing.assert_array_equal(latents(text, prompt_embeds=given), latents(text, prompt_embeds=given.astype(np.float32)))
    np.testing.assert_array_equal(latents(text, prompt_embeds=given.tolist()), latents(text, prompt_embeds=given.astype(np.float32)))


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint8, np.float32])
def test_masks_of_any_dtype(text: Generator, dtype: type) -> None:
    expected = latents(text, prompt_embeds=EMBEDS, prompt_attention_mask=MASK.tolist())
    np.testing.assert_array_equal(latents(text, prompt_embeds=EMBEDS, prompt_attention_mask=MASK.astype(dtype)), expected)


def test_tensors_of_torch(text: Generator) -> None:
    torch = pytest.importorskip("torch")
    expected = latents(text, prompt_embeds=EMBEDS, prompt_attention_mask=MASK)
    given = latents(text, prompt_embeds=torch.from_numpy(EMBEDS), prompt_attention_mask=torch.from_numpy(MASK).bool())
    np.testing.assert_array_equal(given, expected)
    for tensor in (torch.from_numpy(EMBEDS).bfloat16(), torch.from_numpy(EMBEDS).requires_grad_()):
        with pytest.raises(InvalidArgumentError, match=r"Convert a torch tensor first: tensor\.detach\(\)\.float\(\)\.cpu\(\)\.numpy\(\)"):
            text(prompt_embeds=tensor)


def test_defaults_of_numbers(text: Generator) -> None:
    default = text(prompt_embeds=EMBEDS, seed=SEEDS)
    assert default.conditioning["guidance_scale"].tolist() == [toy_bundle.GUIDANCE] * 3
    guided = text(prompt_embeds=EMBEDS, seed=SEEDS, guidance_scale=1.5)
    np.testing.assert_array_equal(guided.array, toy_bundle.decode(toy_bundle.sample(SEEDS, EMBEDS, guidance=1.5)))
    assert not np.array_equal(default.array, guided.array)


def test_inputs_of_other_names(text: Generator) -> None:
    given = latents(text, prompt_embeds=EMBEDS, conditioning={"score": [1, 2, 30], "guidance_scale": 2})
    np.testing.assert_allclose(given, toy_bundle.sample(SEEDS, EMBEDS, guidance=2, score=[1, 2, 30]), atol=1e-5)
    np.testing.assert_array_equal(latents(text, conditioning={"prompt_embeds": EMBEDS}), latents(text, prompt_embeds=EMBEDS))


def wrong_mask(value: float) -> NDArray[np.float64]:
    mask = np.ones((3, 7))
    mask[1, 2] = value
    return mask


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"needs prompt_embeds: float32 \[N, tokens, 5\], or \[tokens, 5\] for all samples, from the model's text encoder.*--prompt-embeds FILE"),
        ({"prompt_attention_mask": MASK}, r"needs prompt_embeds: float32 \[N, tokens, 5\]"),
        ({"prompt_embeds": EMBEDS[..., :4]}, r"prompt_embeds must have the shape \[tokens, 5\] or \[N, tokens, 5\], got \[3, 7, 4\]"),
        ({"prompt_embeds": EMBEDS[0, 0]}, r"prompt_embeds must have the shape .*, got \[5\]"),
        ({"prompt_embeds": EMBEDS[None]}, r"prompt_embeds must have the shape .*, got \[1, 3, 7, 5\]"),
        ({"prompt_embeds": EMBEDS[:, :0]}, r"prompt_embeds must have the shape .*, got \[3, 0, 5\]"),
        ({"prompt_embeds": EMBEDS[:0]}, "prompt_embeds must hold at least one value, got none"),
        ({"prompt_embeds": EMBEDS * np.nan}, "prompt_embeds must be finite, got NaN or infinity"),
        ({"prompt_embeds": EMBEDS.astype(np.float64) * 1e300}, "prompt_embeds must be finite, got NaN or infinity"),
        ({"prompt_embeds": EMBEDS * 1j}, r"prompt_embeds must be an array of numbers, got ndarray \(complex64 is not a real dtype\)"),
        ({"prompt_embeds": "a cat"}, "prompt_embeds must be an array of numbers, got str"),
        ({"prompt_embeds": [[1.0, 2.0], [3.0]]}, "prompt_embeds must be an array of numbers, got list"),
        ({"prompt_embeds": {"a": 1}}, "prompt_embeds must be an array of numbers, got dict"),
        (
            {"prompt_embeds": EMBEDS, "prompt_attention_mask": np.ones((3, 6))},
            r"mask must have the same number of tokens, got 7 and 6, in prompt_embeds \[3, 7, 5\] and prompt_attention_mask \[3, 6\]",
        ),
        (
            {"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK[..., None]},
            r"prompt_attention_mask must have the shape \[tokens\] or \[N, tokens\], got \[3, 7, 1\]",
        ),
        (
            {"prompt_embeds": EMBEDS, "prompt_attention_mask": wrong_mask(2)},
            "prompt_attention_mask must hold ones and zeros only, got 2",
        ),
        ({"prompt_embeds": EMBEDS, "prompt_attention_mask": wrong_mask(0.5)}, "prompt_attention_mask must hold ones and zeros only, got 0.5"),
        ({"prompt_embeds": EMBEDS, "prompt_attention_mask": wrong_mask(np.nan)}, "prompt_attention_mask must hold ones and zeros only, got nan"),
        (
            {"prompt_embeds": EMBEDS, "prompt_attention_mask": np.zeros(7)},
            "prompt_attention_mask must have at least one 1 per sample, got only zeros",
        ),
        ({"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK * [[1], [0], [1]]}, "prompt_attention_mask must have at least one 1 per sample"),
        ({"prompt_embeds": EMBEDS, "batch_size": 2}, "all arguments must be for one batch size, got prompt_embeds: 3, batch_size: 2"),
        ({"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK[:2]}, "must be for one batch size, got prompt_embeds: 3, prompt_attention_mask: 2"),
        (
            {"prompt_embeds": EMBEDS, "class_labels": 1},
            "class_labels was given, but the bundle 'text' takes prompt_embeds, prompt_attention_mask, guidance_scale",
        ),
        ({"prompt_embeds": EMBEDS, "conditioning": {"scores": 1}}, "scores was given, but the bundle 'text' takes prompt_embeds, prompt_attention_mask"),
        ({"prompt_embeds": EMBEDS, "conditioning": {"prompt_embeds": EMBEDS}}, "prompt_embeds was given both as an argument and in conditioning"),
        ({"prompt_embeds": EMBEDS, "conditioning": [("score", 1)]}, "conditioning must be a dict of the model's inputs by name, got list"),
        ({"prompt_embeds": EMBEDS, "conditioning": {"score": np.inf}}, "score must be a finite number"),
        ({"prompt_embeds": EMBEDS, "guidance_scale": [[1.0]]}, "guidance_scale must be a finite number or one per sample"),
    ],
)
def test_what_does_not_fit(text: Generator, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        text(**arguments)


# ----------------------------------------------------------------------------
# Encoder, decoder, previews.


def test_encode_and_decode(text: Generator) -> None:
    x = toy_bundle.sample(SEEDS, EMBEDS)
    pixels = text.decode(x)
    np.testing.assert_array_equal(pixels, toy_bundle.decode(x))
    encoded = text.encode(pixels)
    assert encoded.dtype == np.float32
    assert encoded.shape == x.shape
    np.testing.assert_allclose(encoded, x, atol=0.5 / 32 + 1e-6, err_msg="half a level of rounding")
    np.testing.assert_array_equal(text.decode(encoded)[..., :2], pixels[..., :2], err_msg="the third channel is a sum")


def test_encode_takes_pictures_of_pil(text: Generator) -> None:
    pixels = toy_bundle.decode(toy_bundle.sample(SEEDS, EMBEDS))
    images = [Image.fromarray(picture) for picture in pixels]
    np.testing.assert_array_equal(text.encode(images), text.encode(pixels))
    np.testing.assert_array_equal(text.encode(images[1]), text.encode(pixels[1:2]))


def test_previews(text: Generator) -> None:
    seen: list[NDArray[np.uint8]] = []
    samples = text(
        prompt_embeds=EMBEDS, seed=SEEDS, callback_on_step_end=lambda generator, _k, _t, state: seen.append(generator.decode(state["latents"], preview=True))
    )
    assert [preview.shape for preview in seen] == [(3, *toy_bundle.PREVIEW_SHAPE)] * 2
    np.testing.assert_array_equal(seen[1].repeat(2, axis=1).repeat(2, axis=2), samples.array)


def test_encoder_and_preview_are_opened_once_and_when_needed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = session.Session.__init__

    def spy(self: session.Session, path: Path, *arguments: Any) -> None:
        opened.append(path.name)
        original(self, path, *arguments)

    monkeypatch.setattr(session.Session, "__init__", spy)
    generator = Generator(bundle)
    assert opened == ["noise.onnx", "step.fp32.onnx", "decode.fp32.onnx"]
    x = toy_bundle.sample(SEEDS, EMBEDS)
    with ThreadPoolExecutor(8) as pool:
        previews = list(pool.map(lambda _: generator.decode(x, preview=True), range(32)))
        codes = list(pool.map(lambda _: generator.encode(toy_bundle.decode(x)), range(32)))
    assert sorted(opened[3:]) == ["encode.fp32.onnx", "preview.fp32.onnx"]
    assert all(np.array_equal(preview, toy_bundle.preview(x)) for preview in previews)
    assert all(np.array_equal(code, codes[0]) for code in codes)


def with_half_graphs(bundle: Path, copy: Path, step: bytes | None = None) -> Path:
    """Copy a bundle and add fp16 graphs: copies of the fp32 graphs, or ``step``. Encoder and preview decoder remain fp32 only."""
    shutil.copytree(bundle, copy)
    manifest = read_manifest(copy)
    for graph in ("step", "decode"):
        data = step if step is not None and graph == "step" else (bundle / f"{graph}.fp32.onnx").read_bytes()
        path = copy / f"{graph}.fp16.onnx"
        path.write_bytes(data)
        manifest.files[path.name] = FileEntry(size=len(data), sha256=sha256(path))
    (copy / MANIFEST).write_bytes(msgspec.structs.replace(manifest, dtypes=("fp32", "fp16")).to_json())
    return copy


def test_encoder_and_preview_in_fp32_serve_other_dtypes(bundle: Path, tmp_path: Path) -> None:
    with Generator(with_half_graphs(bundle, tmp_path / "half.scm"), dtype="fp16") as generator:
        x = generator(prompt_embeds=EMBEDS, seed=7, output_type="latent").array
        np.testing.assert_array_equal(generator.decode(x, preview=True), toy_bundle.preview(x))
        np.testing.assert_allclose(generator.encode(generator.decode(x)), x, atol=0.5 / 32 + 1e-6)


def test_a_dtype_that_onnxruntime_cannot_compute_in(bundle: Path, tmp_path: Path) -> None:
    half = with_half_graphs(bundle, tmp_path / "half.scm", step=b"no graph")
    with pytest.raises(InferenceError, match=r"cannot open '.*step\.fp16\.onnx'.* Or compute in fp32, which every bundle can: dtype='fp32'"):
        Generator(half, dtype="fp16")
    Generator(half).close()


def test_a_graph_with_two_outputs(tmp_path: Path) -> None:
    path = tmp_path / "step.fp32.onnx"
    text = f"{toy_bundle.HEADER} g (float[n] x) => (float[n] a, float[n] b) {{ a = Identity(x)\n b = Neg(x) }}"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    with pytest.raises(InferenceError, match=r"step\.fp32\.onnx' must have one output, got a, b"):
        open_session(path)


PIXELS = np.zeros((1, *toy_bundle.IMAGE_SHAPE), np.uint8)
RED = Image.fromarray(PIXELS[0])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (PIXELS[0], r"images must be uint8 \[N, 8, 12, 3\], got uint8 \[8, 12, 3\]"),
        (PIXELS.swapaxes(1, 2), r"images must be uint8 \[N, 8, 12, 3\], got uint8 \[1, 12, 8, 3\]"),
        (PIXELS.astype(np.float32), r"images must be uint8 \[N, 8, 12, 3\], got float32 \[1, 8, 12, 3\]"),
        (PIXELS[:0], "images must hold at least one image, got none"),
        ([], "images must hold at least one image, got none"),
        (RED.resize((8, 12)), r"images must have the size 12 x 8, got 8 x 12\. Resize them: image\.resize\(\(12, 8\)\)"),
        ([RED, RED.resize((24, 16))], "images must have the size 12 x 8, got 24 x 16"),
        (RED.convert("L"), r"images must have the mode RGB, got L\. Convert them: image\.convert\('RGB'\)"),
        (RED.convert("RGBA"), "images must have the mode RGB, got RGBA"),
        ("cat.png", r"images must be PIL images or an array uint8 \[N, 8, 12, 3\], got str"),
        ([PIXELS[0]], r"images must be PIL images or an array uint8 \[N, 8, 12, 3\], got list"),
    ],
)
def test_pictures_that_do_not_fit(text: Generator, images: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        text.encode(images)


@pytest.mark.parametrize("preview", [False, True])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 4, 6)), r"latents must have shape \[N, 2, 4, 6\], got \[2, 4, 6\]"),
        (np.zeros((0, 2, 4, 6)), "latents must hold at least one value, got none"),
        (np.full((1, 2, 4, 6), np.nan), "latents must be finite"),
        ("x", "latents must be an array of numbers"),
    ],
)
def test_latents_that_do_not_fit(text: Generator, x: Any, message: str, preview: bool) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        text.decode(x, preview=preview)


def test_after_closing(bundle: Path) -> None:
    with Generator(bundle) as generator:
        pass
    for use in (lambda: generator.encode(PIXELS), lambda: generator.decode(np.zeros((1, 2, 4, 6))), lambda: generator(prompt_embeds=EMBEDS)):
        with pytest.raises(InvalidArgumentError, match="closed: make a new one"):
            use()


# ----------------------------------------------------------------------------
# No decoder.


@pytest.mark.parametrize("output_type", ["pil", "np", "latent", None])
def test_a_bundle_without_a_decoder_gives_latents(plain: Path, output_type: Any, tmp_path: Path) -> None:
    with Generator(plain) as generator:
        samples = generator(prompt_embeds=EMBEDS, seed=SEEDS, **({"output_type": output_type} if output_type else {}))
    assert samples.array.dtype == np.float32
    np.testing.assert_allclose(samples.array, toy_bundle.sample(SEEDS, EMBEDS), atol=1e-5)
    for use in (lambda: samples.images, lambda: samples.save(tmp_path / "x.png")):
        with pytest.raises(InvalidArgumentError, match=r"their bundle has no decoder\. Decode them yourself, or export the checkpoint again .* --decoder"):
            use()
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda generator: generator.encode(PIXELS), r"the bundle 'plain' has no encoder\. .* scm-export … --with-encoder"),
        (
            lambda generator: generator.decode(np.zeros((1, 2, 4, 6)), preview=True),
            r"the bundle 'plain' has no preview decoder\. .* scm-export … --preview-decoder",
        ),
        (lambda generator: generator.decode(np.zeros((1, 2, 4, 6))), r"the bundle 'plain' has no decoder\. .* scm-export … --decoder"),
    ],
)
def test_what_a_bundle_does_not_have(plain: Path, use: Callable[[Generator], object], message: str) -> None:
    with Generator(plain) as generator, pytest.raises(InvalidArgumentError, match=message):
        use(generator)


# ----------------------------------------------------------------------------
# On the command line.


def test_generate_from_embeddings_in_a_file(bundle: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "prompt.npz", prompt_embeds=EMBEDS, prompt_attention_mask=MASK)
    np.savez_compressed(tmp_path / "half.npz", prompt_embeds=EMBEDS[0].astype(np.float16))
    np.save(tmp_path / "one.npy", EMBEDS[0])
    half = EMBEDS[0].astype(np.float16).astype(np.float32)
    for file, options, x in (
        ("prompt.npz", ["--guidance-scale", "2"], toy_bundle.sample(SEEDS, EMBEDS, MASK, 2)),
        ("half.npz", ["--batch-size", "3"], toy_bundle.sample(SEEDS, half)),
        ("one.npy", ["--steps", "1"], toy_bundle.sample([7], EMBEDS[0], steps=1)),
    ):
        result = call("generate", bundle, "-o", tmp_path / "out.png", "--seed", "7", "--prompt-embeds", tmp_path / file, *options)
        assert result.exit_code == 0, result.output
        with Image.open(tmp_path / "out.png") as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(grid(toy_bundle.decode(x))), err_msg=file)


def saved(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def bomb() -> bytes:
    """Two megabytes of zeros in two kilobytes."""
    file = io.BytesIO()
    np.savez_compressed(file, prompt_embeds=np.zeros((2**19 // toy_bundle.WIDTH, toy_bundle.WIDTH), np.float32))
    return file.getvalue()


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.target), "w")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda _: None, "No such file or directory"),
        (lambda _: b"", "cannot read embeddings from"),
        (lambda _: b"a cat on a mat" * 9, "cannot read embeddings from"),
        (lambda _: saved(prompt_embeds=EMBEDS)[:-300], "cannot read embeddings from"),
        (lambda _: saved(prompt_embeds=EMBEDS).replace(b"float32", b"flaot32").replace(b"<f4", b"<q9"), "cannot read embeddings from"),
        (lambda _: saved(embeds=EMBEDS), "it holds embeds. Expected a .npz with the array prompt_embeds"),
        (lambda _: saved(prompt_embeds=EMBEDS, negative=EMBEDS), "it holds negative, prompt_embeds"),
        (lambda here: saved(prompt_embeds=np.array([Code(here / "code-has-run")], object)), "its values must be real numbers, got the dtype object"),
        (lambda _: bomb(), "it unpacks to 2,097,"),
        (lambda _: saved(prompt_embeds=EMBEDS[..., :4]), "--prompt-embeds must have the shape [tokens, 5] or [N, tokens, 5], got [3, 7, 4]"),
        (lambda _: saved(prompt_embeds=EMBEDS, prompt_attention_mask=np.ones((3, 6))), "must have the same number of tokens, got 7 and 6"),
    ],
    ids=["missing", "empty", "text", "truncated", "damaged header", "other name", "more", "code", "bomb", "width", "length"],
)
def test_a_file_of_embeddings_that_cannot_be_used(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Callable[[Path], bytes | None], message: str
) -> None:
    monkeypatch.setattr("scm_runtime.cli.embeddings.MAX_UNPACKED_BYTES", 2**20)
    path, content = tmp_path / "prompt.npz", data(tmp_path)
    if content is not None:
        path.write_bytes(content)
    before = tree(tmp_path)
    result = call("generate", bundle, "-o", tmp_path / "out.png", "--prompt-embeds", path)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert tree(tmp_path) == before


def test_generate_without_embeddings(bundle: Path, plain: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", EMBEDS[0])
    for arguments, message in (
        ([bundle], "this bundle needs prompt_embeds: float32 [N, tokens, 5]"),
        (["digits", "--prompt-embeds", tmp_path / "one.npy"], "--prompt-embeds was given, but the bundle 'digits' takes --labels"),
        ([plain, "--prompt-embeds", tmp_path / "one.npy"], "the bundle 'plain' makes latents, not images: it has no decoder"),
    ):
        result = call("generate", *arguments, "-o", tmp_path / "out.png")
        assert result.exit_code == 2
        assert message in result.stderr
    assert sorted(tree(tmp_path)) == ["one.npy"]


def test_inspect(bundle: Path, plain: Path) -> None:
    shown = " ".join(call("inspect", bundle).stdout.split())
    for fragment in (
        "also an encoder, a preview decoder",
        "image, uint8 [N, 8, 12, 3]",
        "prompt_embeds embedding, float32 [N, tokens, 5], required",
        "prompt_attention_mask mask, int64 [N, tokens], default all ones",
        "guidance_scale scalar, float32 [N], default 4.5",
    ):
        assert fragment in shown
    shown = " ".join(call("inspect", plain).stdout.split())
    assert "latent, no decoder, float32 [N, 2, 4, 6]" in shown
    assert "also" not in shown


def test_smoke_names_the_placeholder_inputs(bundle: Path, plain: Path) -> None:
    for path in (bundle, plain):
        result = call("smoke", path)
        assert result.exit_code == 0, result.output
        assert result.stdout.count("yes") == 8
        assert "random values for prompt_embeds float32 [N, tokens, 5], 7 tokens" in result.stdout
