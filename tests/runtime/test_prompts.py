"""Prompts: token ids, the text encoder of a bundle, and every way to call it, with the toy bundle of ``toy_text``."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

import toy_bundle
import toy_text
from scm_runtime import (
    BundleError,
    BundleSchemaError,
    DevicePool,
    GenerationTimeoutError,
    Generator,
    GeneratorClosedError,
    InferenceError,
    InvalidArgumentError,
)
from scm_runtime.bundle.manifest import TextSpec, read_manifest
from scm_runtime.engines.sessions import BundleSessions
from scm_runtime.ort import session
from scm_runtime.text import encoder, tokenizer

PROMPTS = ["a lighthouse at dusk", "猫が座る 🐈", ""]
SEEDS = (7, 8, 9)
LONG = "a cat on a mat in the rain, far too long"

# Letters of the scripts from which the strings for the comparison with transformers are drawn.
SCRIPTS = {
    "latin": "abcdefghij XYZ éèüßøñ ıİ 'tis ",
    "greek and cyrillic": "αβγδε Ωψ жзий ЁЯ ђ",
    "hebrew and arabic": "אבגד שלום مرحبا بالعالم ٣٤",
    "indic": "नमस्ते दुनिया தமிழ் বাংলা ",
    "east asian": "你好 世界 猫が座る カタカナ 안녕하세요 ",
    "south-east asian": "สวัสดีชาวโลก ភាសាខ្មែរ မြန်မာ",
    "symbols": "1234567890 !?.,;:'\"()[]{} <s> </s> |endoftext| \t\n  \u00a0\u200b\u2028",
    "emoji": "🐈🏳️‍🌈👩‍🚀😀🇫🇷 ☃️",
    "combining": "e\u0301 a\u030a o\u0308\u0304 ﬁ Å ½ ",
}


def strings() -> list[str]:
    """500 strings, each from one to three scripts, and of 0 to 60 characters."""
    rng, listed = random.Random(0), list(SCRIPTS.values())
    return ["", " ", "\n", *("".join(rng.choices("".join(rng.sample(listed, rng.randint(1, 3))), k=rng.randint(1, 60))) for _ in range(497))]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_text.write_prompt_bundle(tmp_path_factory.mktemp("prompts") / "text.scm")


@pytest.fixture(scope="module")
def generate(bundle: Path) -> Iterator[Generator]:
    with Generator(bundle) as generator:
        yield generator


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    """A model that uses a negative prompt."""
    with Generator(toy_text.write_prompt_bundle(tmp_path_factory.mktemp("guided") / "guided.scm", negative=True)) as generator:
        yield generator


def latents(generator: Generator | DevicePool, **arguments: Any) -> NDArray[np.float32]:
    array: NDArray[np.float32] = generator(output_type="latent", **arguments).array
    return array


# ----------------------------------------------------------------------------
# Token ids.


def clip_tokenizer() -> Any:
    """transformers' tokenizer of CLIP, with a small vocabulary."""
    transformers = pytest.importorskip("transformers")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["li", "gh", "t", "at</w>", "li gh", "a t</w>"]
    merges = [("l", "i"), ("g", "h"), ("a", "t</w>"), ("li", "gh")]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), *words, "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges)


def sentence_tokenizer() -> Any:
    """transformers' wrapper of a tokenizer like Gemma's: pieces of whole sentences with bytes for unknown letters, padded at the left."""
    transformers = pytest.importorskip("transformers")
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False)
    made.train_from_iterator(toy_text.CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>", padding_side="left")


@pytest.mark.parametrize(("make", "length"), [(clip_tokenizer, 77), (sentence_tokenizer, 40)])
def test_token_ids_are_those_of_transformers(make: Callable[[], Any], length: int, tmp_path: Path) -> None:
    theirs = make()
    (tmp_path / "tokenizer.json").write_text(theirs.backend_tokenizer.to_str(), encoding="utf-8")
    spec = toy_text.text_tokenizer(max_length=length, pad_token_id=theirs.pad_token_id, padding_side=theirs.padding_side, vocab_size=len(theirs))
    ours = tokenizer.PromptTokenizer(tmp_path / "tokenizer.json", spec).encode(strings())
    expected = theirs(strings(), padding="max_length", max_length=length, truncation=True, return_tensors="np")
    assert len(strings()) == 500
    np.testing.assert_array_equal(ours.ids, expected["input_ids"])
    np.testing.assert_array_equal(ours.mask, expected["attention_mask"])
    assert 0 < len(ours.cut) < 500, "some are too long"


def test_a_prefix_comes_first_and_the_prompt_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(toy_text.tokenizer().to_str())
    spec = toy_text.text_tokenizer(prefix=toy_text.PREFIX, strip=True, lowercase=True, max_length=30)
    made = tokenizer.PromptTokenizer(tmp_path / "tokenizer.json", spec).encode(["\n A Cat  "])
    expected = toy_text.tokenizer().encode("draw: a cat").ids
    assert made.ids[0].tolist() == [*expected, *[0] * (30 - len(expected))]
    assert made.mask.sum() == len(expected)


# ----------------------------------------------------------------------------
# Calls.


@pytest.mark.parametrize("steps", [1, 2])
def test_images_of_prompts(generate: Generator, steps: int) -> None:
    samples = generate(prompt=PROMPTS, seed=7, num_inference_steps=steps)
    expected = toy_text.sample(SEEDS, PROMPTS, steps=steps)
    np.testing.assert_array_equal(samples.array, toy_bundle.decode(expected))
    assert samples.seeds == SEEDS, "the prompts set the batch size"
    assert 0 < samples.timings.text < samples.timings.total


def test_one_prompt_serves_all_samples(generate: Generator) -> None:
    np.testing.assert_allclose(latents(generate, prompt="a cat", seed=SEEDS), toy_text.sample(SEEDS, ["a cat"] * 3), atol=1e-5)
    np.testing.assert_allclose(latents(generate, prompt=np.array(PROMPTS), seed=SEEDS), toy_text.sample(SEEDS, PROMPTS), atol=1e-5)


def test_encoded_prompts_are_passed_back(generate: Generator) -> None:
    encoded = generate.encode_prompt(PROMPTS)
    embeds, mask = toy_text.encode(PROMPTS)
    assert list(encoded) == ["prompt_embeds", "prompt_attention_mask"]
    np.testing.assert_allclose(encoded["prompt_embeds"], embeds, atol=1e-6)
    np.testing.assert_array_equal(encoded["prompt_attention_mask"], mask)
    expected = latents(generate, prompt=PROMPTS, seed=7)
    np.testing.assert_array_equal(latents(generate, seed=7, **encoded), expected)
    np.testing.assert_array_equal(latents(generate, seed=7, conditioning=encoded), expected)
    assert generate.encode_prompt("a cat")["prompt_embeds"].shape == (1, toy_text.MAX_LENGTH, toy_bundle.WIDTH)


def test_negative_prompts(guided: Generator) -> None:
    for negative, expected in (("ugly", ["ugly"] * 2), (["ugly", "dark"], ["ugly", "dark"]), (None, ["", ""])):
        wanted = toy_text.sample((7, 8), PROMPTS[:2], expected)
        np.testing.assert_allclose(latents(guided, prompt=PROMPTS[:2], negative_prompt=negative, seed=7), wanted, atol=1e-5)
        encoded = guided.encode_prompt(PROMPTS[:2], negative)
        np.testing.assert_allclose(latents(guided, seed=7, **encoded), wanted, atol=1e-5)
    given = guided.encode_prompt("", "dark")
    mixed = {name: given[name][0] for name in ("negative_prompt_embeds", "negative_prompt_attention_mask")}
    np.testing.assert_allclose(latents(guided, prompt="a cat", seed=7, **mixed), toy_text.sample([7], ["a cat"], ["dark"]), atol=1e-5)
    embeds = {name: given[name] for name in ("prompt_embeds", "prompt_attention_mask")}
    np.testing.assert_allclose(latents(guided, negative_prompt="dark", seed=7, **embeds), toy_text.sample([7], [""], ["dark"]), atol=1e-5)


def test_no_negative_prompt_can_mean_zeros(tmp_path: Path) -> None:
    outputs = ("prompt_embeds", "prompt_attention_mask")
    spec = TextSpec(
        tokenizers=(toy_text.text_tokenizer(),), outputs=outputs, negative_outputs=tuple(f"negative_{name}" for name in outputs), zero_negative=True
    )
    with Generator(toy_text.write_prompt_bundle(tmp_path / "zeros.scm", negative=True, spec=spec)) as generator:
        np.testing.assert_allclose(latents(generator, prompt="a cat", seed=7), toy_text.sample([7], ["a cat"]), atol=1e-5)
        np.testing.assert_allclose(latents(generator, prompt="a cat", negative_prompt="", seed=7), toy_text.sample([7], ["a cat"], [""]), atol=1e-5)


def test_all_ways_to_call(generate: Generator, bundle: Path) -> None:
    expected = latents(generate, prompt=PROMPTS, seed=7)
    arguments: dict[str, Any] = {"prompt": PROMPTS, "seed": 7, "output_type": "latent"}
    np.testing.assert_array_equal(generate.submit(**arguments).result().array, expected)
    np.testing.assert_array_equal(asyncio.run(generate.async_(**arguments, timeout=60)).array, expected)
    batches = list(generate.stream(3, batch_size=2, **arguments))
    assert [len(batch) for batch in batches] == [2, 1]
    np.testing.assert_allclose(np.concatenate([batch.array for batch in batches]), expected, atol=1e-6)
    one = list(generate.stream(3, batch_size=2, prompt="a cat", seed=7, output_type="latent"))
    np.testing.assert_allclose(np.concatenate([batch.array for batch in one]), toy_text.sample(SEEDS, ["a cat"] * 3), atol=1e-5)
    with DevicePool(bundle, devices=("cpu",)) as pool:
        np.testing.assert_array_equal(pool(**arguments).array, expected)
        np.testing.assert_array_equal(pool.submit(**arguments).result().array, expected)
        np.testing.assert_array_equal(asyncio.run(pool.async_(**arguments)).array, expected)
        np.testing.assert_array_equal(pool.encode_prompt(PROMPTS)["prompt_embeds"], generate.encode_prompt(PROMPTS)["prompt_embeds"])


def spy_on_text(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the batch size of each run of the text graph."""
    sizes: list[int] = []
    original = BundleSessions.encode_tokens

    def spy(self: BundleSessions, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        sizes.append(len(inputs["input_ids"]))
        return original(self, inputs)

    monkeypatch.setattr(BundleSessions, "encode_tokens", spy)
    return sizes


def test_the_encoder_is_opened_once_and_when_needed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    for kind in (session.Session, tokenizer.PromptTokenizer):
        original = kind.__init__

        def spy(self: Any, path: Path, *arguments: Any, original: Any = original) -> None:
            opened.append(path.name)
            original(self, path, *arguments)

        monkeypatch.setattr(kind, "__init__", spy)
    with Generator(bundle) as generator:
        latents(generator, prompt_embeds=toy_bundle.EMBEDS, seed=7)
        assert opened == ["noise.onnx", "step.fp32.onnx", "decode.fp32.onnx"]
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda i: latents(generator, prompt=f"a cat {i % 4}", seed=7), range(32)))
        assert sorted(opened[3:]) == ["text.fp32.onnx", "tokenizer.json"]
    for i, result in enumerate(results):
        np.testing.assert_allclose(result, toy_text.sample([7], [f"a cat {i % 4}"]), atol=1e-5)


def test_equal_prompts_are_encoded_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = spy_on_text(monkeypatch)
    with Generator(bundle) as generator:
        prompts = [f"a cat {i % 50}" for i in range(10_000)]
        encoded = generator.encode_prompt(prompts)
        assert sizes == [encoder.MAX_BATCH] * 6 + [2]
        np.testing.assert_allclose(encoded["prompt_embeds"], toy_text.encode(prompts)[0], atol=1e-6)
        sizes.clear()
        list(generator.stream(6, batch_size=2, prompt=["a dog"] * 3 + ["a cat"] * 3, seed=1))
        assert sum(sizes) == 2, "those of the latest batch are known"


def test_warmup_opens_the_encoder_and_uses_its_length(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = spy_on_text(monkeypatch)
    with Generator(bundle) as generator:
        generator.warmup(batch_sizes=(1, 2))
        assert sizes == [1]
        generator.warmup(conditioning=generator.encode_prompt("a cat"))
        assert sizes == [1, 1]


# ----------------------------------------------------------------------------
# Long prompts.


def test_a_long_prompt_is_cut_off_with_a_warning(generate: Generator, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "scm_runtime"):
        array = latents(generate, prompt=[LONG, LONG, "a cat"], seed=7)
    np.testing.assert_allclose(array, toy_text.sample(SEEDS, [LONG, LONG, "a cat"]), atol=1e-5)
    kept = toy_text.tokenizer().encode(LONG, add_special_tokens=False).offsets[toy_text.MAX_LENGTH - 3][1]
    assert [record.getMessage() for record in caplog.records] == [f"prompt must have at most 12 tokens; its end was cut off: {LONG[kept:]!r}"]
    assert LONG[kept:].endswith("far too long")


def test_strict_refuses_a_long_prompt(generate: Generator, guided: Generator) -> None:
    for call in (
        lambda: generate(prompt=LONG, strict_prompt=True),
        lambda: generate.submit(prompt=["a cat", LONG], strict_prompt=True),
        lambda: generate.stream(3, prompt=LONG, strict_prompt=True),
        lambda: generate.encode_prompt(LONG, strict=True),
    ):
        with pytest.raises(InvalidArgumentError, match=r"prompt must have at most 12 tokens, and this is beyond them: '.*far too long'\. Shorten it"):
            call()
    with pytest.raises(InvalidArgumentError, match="negative_prompt must have at most 12 tokens"):
        guided(prompt="a cat", negative_prompt=LONG, strict_prompt=True)
    generate(prompt="a cat", strict_prompt=True)


def test_many_long_prompts_are_few_lines_in_the_log(generate: Generator, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "scm_runtime"):
        generate.encode_prompt([f"{LONG} {i}" for i in range(100)])
    assert len(caplog.records) == 6
    assert caplog.records[-1].getMessage() == "95 more prompts of this call were cut off"


# ----------------------------------------------------------------------------
# Ending a call while its prompts are encoded.

# The text graph loops a million times per token id: this prompt takes minutes.
SLOW_TEXT = toy_text.TEXT.replace(
    "ids = Cast<to=1>(input_ids)",
    f"""numbers = Cast<to=1>(input_ids)
    most = ReduceMax<keepdims=0>(numbers){toy_bundle.spin("most")}    ids = Add(numbers, nothing)""",
)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_text.write_prompt_bundle(tmp_path_factory.mktemp("slow") / "slow.scm", text=SLOW_TEXT)


def test_a_timeout_ends_the_encoding(slow: Path) -> None:
    with Generator(slow) as generator:
        start = time.monotonic()
        for call in (
            lambda: generator(prompt="a cat", timeout=0.2),
            lambda: generator.submit(prompt="a cat", timeout=0.2),
            lambda: asyncio.run(generator.async_(prompt="a cat", timeout=0.2)),
        ):
            with pytest.raises(GenerationTimeoutError, match=r"timeout=0\.2 seconds"):
                call()
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(generator.async_(prompt="a cat"), 0.2))
        assert time.monotonic() - start < 10


def test_close_ends_the_encoding(slow: Path) -> None:
    generator = Generator(slow)
    timer = threading.Timer(0.3, generator.close)
    timer.start()
    with pytest.raises(GeneratorClosedError):
        generator.encode_prompt("a cat")
    timer.join()
    with pytest.raises(GeneratorClosedError):
        generator.encode_prompt("a cat")


# ----------------------------------------------------------------------------
# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "the bundle 'text' needs a prompt: prompt='…', or its embeddings: prompt_embeds"),
        ({"prompt": 3}, r"prompt must be a string, or a list with one per sample, got int\."),
        ({"prompt": b"a cat"}, r"got bytes\. Decode the bytes first"),
        ({"prompt": ["a cat", 3]}, r"prompt\[1\] must be a string, got 3 \(int\)"),
        ({"prompt": []}, "prompt must hold at least one prompt, got none"),
        ({"prompt": "a \ud83d cat"}, r"prompt must be valid Unicode, got half of a surrogate pair, \\ud83d, at character 2"),
        ({"prompt": "a" * 1_000_001}, "prompt must have at most 1,000,000 characters, got 1,000,001"),
        ({"prompt": "a cat", "prompt_embeds": toy_bundle.EMBEDS}, "prompt was given, and prompt_embeds too. Give one of the two"),
        ({"prompt": "a cat", "conditioning": {"prompt_attention_mask": [1, 1]}}, "prompt was given, and prompt_attention_mask too"),
        ({"prompt": "a cat", "negative_prompt": "dark"}, "negative_prompt was given, but the bundle 'text' uses none. Leave it out"),
        ({"prompt": "a cat", "strict_prompt": 1}, "strict_prompt must be True or False, got 1"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "all arguments must be for one batch size, got prompt: 2, seed: 3"),
        ({"prompt": ["a", "b"], "batch_size": 3}, "all arguments must be for one batch size, got prompt: 2, batch_size: 3"),
        ({"prompt": "a", "conditioning": 3}, "conditioning must be a dict"),
        ({"prompt": "a", "latents": np.zeros((1, 2))}, "latents must have shape"),
    ],
)
def test_prompts_that_cannot_be_used(generate: Generator, arguments: dict[str, Any], message: str) -> None:
    for call in (generate, generate.submit):
        with pytest.raises(InvalidArgumentError, match=message):
            call(**arguments)


def test_lists_of_prompts_in_a_stream_are_for_all_images(generate: Generator, guided: Generator) -> None:
    with pytest.raises(InvalidArgumentError, match="prompt must be one for all samples, or one for each of the 3, got 2"):
        generate.stream(3, prompt=["a", "b"])
    with pytest.raises(InvalidArgumentError, match="one batch size, got prompt: 2, negative_prompt: 3"):
        guided.encode_prompt(["a", "b"], ["c", "d", "e"])


def test_a_bundle_without_a_text_encoder(tmp_path: Path) -> None:
    with Generator(toy_bundle.write_text_bundle(tmp_path / "plain.scm")) as generator:
        for call in (lambda: generator(prompt="a cat"), lambda: generator.encode_prompt("a cat"), lambda: generator(negative_prompt="a")):
            with pytest.raises(InvalidArgumentError, match=r"prompt was given, but the bundle 'text' has no text encoder\. Give prompt_embeds, or export"):
                call()
    with Generator("digits") as generator, pytest.raises(InvalidArgumentError, match="prompt was given, but the bundle 'digits' takes class_labels"):
        generator(prompt="a seven")


def changed_json(change: Callable[[dict[str, Any]], object]) -> bytes:
    raw = json.loads(toy_text.tokenizer().to_str())
    change(raw)
    return json.dumps(raw).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a tokenizer that tokenizers .* can read"),
        (b"\xff\xfe", "is not a tokenizer"),
        (b'{"version": "1.0"}', "is not a tokenizer"),
        (changed_json(lambda raw: raw["added_tokens"].append({**raw["added_tokens"][0], "id": 320, "content": "<new>"})), r"below the 320 rows .*, got 320"),
        (changed_json(lambda raw: raw["post_processor"]["special_tokens"]["<s>"].update(ids=[400])), r"below the 320 rows .*, got 400"),
        (changed_json(lambda raw: raw["post_processor"].update(single=[{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 12)), "leave room for a prompt beside"),
        (changed_json(lambda raw: raw["post_processor"].update(single=[{"Sequence": {"id": "A", "type_id": 0}}] * 40)), "at most 12 tokens for a prompt, got"),
        (changed_json(lambda raw: raw["post_processor"].update(single=[{"Sequence": {"id": "B", "type_id": 0}}])), "it cannot encode a prompt"),
        (changed_json(lambda raw: raw.update(normalizer={"type": "Replace", "pattern": {"Regex": ""}, "content": "x"})), "it cannot|at most 12 tokens"),
        (b"[" * 100_000, "is not a tokenizer"),
        (b" " * 2_000_000, "it has more than 1048576 bytes"),
    ],
    ids=["empty", "binary", "other JSON", "more ids", "other special ids", "no room", "repeated", "pair", "empty pattern", "nested", "large"],
)
def test_a_tokenizer_that_does_not_fit(tmp_path: Path, data: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "MAX_BYTES", 1 << 20)
    with Generator(toy_text.write_prompt_bundle(tmp_path / "text.scm", tokenizer_file=data)) as generator:
        with pytest.raises(BundleSchemaError, match=message):
            generator(prompt="a cat")
        latents(generator, prompt_embeds=toy_bundle.EMBEDS, seed=7)  # needs no tokenizer


@pytest.mark.parametrize(
    ("old", "new", "kind", "message"),
    [
        (r"\binput_ids\b", "ids_in", BundleError, r"text\.fp32\.onnx' must have the inputs attention_mask, input_ids, got attention_mask, ids_in"),
        (r"\bprompt_embeds\b", "embeds", BundleError, "must have the outputs prompt_embeds, prompt_attention_mask, got embeds, prompt_attention_mask"),
        (r"int64(\S+ prompt_attention_mask)", r"float\1", InferenceError, "cannot open"),
        (r"Add\(waves, shift\)", "Div(waves, zero)", InferenceError, r"the text encoder returned NaN or infinity in prompt_embeds\. Try dtype='fp32'"),
        (r"Add\(waves, shift\)", "Concat<axis=2>(waves, waves)", BundleError, r"must return float32 \[1, \*, 5\], got float32 \[1, 12, 10\]"),
    ],
)
def test_a_text_graph_that_does_not_fit(tmp_path: Path, old: str, new: str, kind: type[Exception], message: str) -> None:
    text = re.sub(old, new, toy_text.TEXT).replace(f"length,{toy_bundle.WIDTH}]", "length,any]")
    with (
        Generator(toy_text.write_prompt_bundle(tmp_path / "text.scm", text=text)) as generator,
        pytest.raises(kind, match=message),
    ):
        generator(prompt="a cat")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.update(outputs=["prompt_embeds", "hidden"]),
            "outputs of the text encoder must be conditioning of kind 'embedding' or 'mask', got hidden",
        ),
        (lambda text: text.update(outputs=["guidance_scale"]), "of kind 'embedding' or 'mask', got guidance_scale"),
        (lambda text: text.update(outputs=["prompt_embeds", "prompt_embeds"]), "outputs and negative_outputs must be different inputs"),
        (lambda text: text.update(outputs=[]), "length >= 1"),
        (lambda text: text.update(negative_outputs=["negative_prompt_embeds"]), "negative_outputs must be as many as outputs, 2, or none; got 1"),
        (
            lambda text: text.update(outputs=["prompt_embeds"], negative_outputs=["negative_prompt_attention_mask"]),
            r"negative_prompt_attention_mask must have the dtype and shape of prompt_embeds, float32 \[N, tokens, 5\]",
        ),
        (lambda text: text["tokenizers"][0].update(file="other.json"), "files must list the text graph and the tokenizers, missing other.json"),
        (lambda text: text["tokenizers"][0].update(pad_token_id=320), "pad_token_id must be below the vocab_size 320, got 320"),
        (lambda text: text["tokenizers"][0].update(attention_mask="input_ids"), "tokenizers must have different inputs, got input_ids, input_ids"),
        (lambda text: text["tokenizers"][0].update(max_length=10**6), "<= 65536"),
        (lambda text: text["tokenizers"][0].update(padding_side="top"), "padding_side"),
        (lambda text: text.update(tokenizers=[]), "length >= 1"),
    ],
)
def test_manifests_that_contradict_themselves(guided: Generator, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    raw = json.loads((guided.folder / "scm.json").read_bytes())
    change(raw["text"])
    (tmp_path / "scm.json").write_text(json.dumps(raw))
    with pytest.raises(BundleSchemaError, match=message):
        read_manifest(tmp_path)


def test_manifests_without_text_have_no_such_key(bundle: Path, tmp_path: Path) -> None:
    plain = toy_bundle.write_text_bundle(tmp_path / "plain.scm")
    assert "text" not in json.loads((plain / "scm.json").read_bytes())
    manifest = read_manifest(bundle)
    assert json.loads(manifest.to_json())["text"]["tokenizers"][0]["max_length"] == toy_text.MAX_LENGTH
    assert {"text.fp32.onnx", "tokenizer.json"} <= set(manifest.files_for("fp32"))
