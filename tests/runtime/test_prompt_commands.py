"""``scm-runtime`` with bundles that have a text encoder: prompts from options and files, the texts in PNG files, and errors."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import scm_runtime
import toy_bundle
import toy_text
from scm_runtime import Generator, InvalidArgumentError
from scm_runtime.bundle.checksums import sha256
from scm_runtime.cli import main
from scm_runtime.cli import prompts as prompt_files
from scm_runtime.samples import grid
from support import tree

LONG = "a cat on a mat in the rain, far too long"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_text.write_prompt_bundle(tmp_path_factory.mktemp("prompts") / "text.scm")


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that uses a negative prompt."""
    return toy_text.write_prompt_bundle(tmp_path_factory.mktemp("guided") / "guided.scm", negative=True)


def call(*arguments: str | Path, stdin: bytes | None = None) -> Result:
    return CliRunner(catch_exceptions=False).invoke(main, [str(argument) for argument in arguments], input=stdin)


def expect_image(path: Path, seeds: Sequence[int], prompts: Sequence[str], negatives: Sequence[str] | None = None) -> dict[str, str]:
    """Compare a file with the image or grid of samples, and return the texts in it."""
    pixels = toy_bundle.decode(toy_text.sample(seeds, prompts, negatives))
    with Image.open(path) as image:
        image.load()
        np.testing.assert_allclose(np.asarray(image).astype(int), np.asarray(grid(pixels)), atol=1)
        return dict(image.text) if hasattr(image, "text") else {}


def test_a_prompt(bundle: Path, tmp_path: Path) -> None:
    result = call("generate", bundle, "-o", tmp_path / "out.png", "--prompt", "猫が座る, ünter", "--seed", "7", "--batch-size", "2")
    assert result.exit_code == 0, result.output
    texts = expect_image(tmp_path / "out.png", [7, 8], ["猫が座る, ünter"] * 2)
    assert texts == {
        "prompt": "猫が座る, ünter",
        "seed": "7, 8",
        "steps": "2",
        "bundle": "text",
        "bundle_sha256": sha256(bundle / "scm.json"),
        "software": f"scm-runtime {scm_runtime.__version__}",
    }


def test_several_prompts_with_several_images_each(guided: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\r\n\r\n  \nüber die Brücke\n".encode())
    for options, stdin in (
        (["--prompt", "a cat", "--prompt", "über die Brücke"], None),
        (["--prompts", tmp_path / "prompts.txt"], None),
        (["--prompts", "-"], b"a cat\n" + "über die Brücke".encode()),
    ):
        out = tmp_path / f"out{len(tree(tmp_path))}"
        arguments = ["--num-images", "2", "--batch-size", "3", "--negative-prompt", "ugly", "--guidance-scale", "4.5", "--seed", "7", "--json"]
        result = call("generate", guided, "-o", f"{out}/", *options, *arguments, stdin=stdin)
        assert result.exit_code == 0, result.output
        written = json.loads(result.stdout)
        assert written["prompts"] == ["a cat", "a cat", "über die Brücke", "über die Brücke"]
        assert written["seeds"] == [7, 8, 9, 10]
        for file, seed, prompt in zip(written["files"], written["seeds"], written["prompts"], strict=True):
            texts = expect_image(Path(file), [seed], [prompt], ["ugly"])
            assert (texts["prompt"], texts["negative_prompt"], texts["seed"], texts["guidance_scale"]) == (prompt, "ugly", str(seed), "4.5")


def test_a_grid_of_several_prompts(bundle: Path, tmp_path: Path) -> None:
    result = call("generate", bundle, "-o", tmp_path / "grid.png", "--prompt", "a cat", "--prompt", "a dog", "--seed", "7")
    assert result.exit_code == 0, result.output
    assert expect_image(tmp_path / "grid.png", [7, 8], ["a cat", "a dog"])["prompt"] == "a cat\na dog"


@pytest.mark.parametrize(("name", "options"), [("out.png", ["--no-metadata"]), ("out.bmp", [])])
def test_files_without_texts(bundle: Path, tmp_path: Path, name: str, options: list[str]) -> None:
    result = call("generate", bundle, "-o", tmp_path / name, "--prompt", "a cat", "--seed", "7", *options)
    assert result.exit_code == 0, result.output
    assert expect_image(tmp_path / name, [7], ["a cat"]) == {}
    assert b"a cat" not in (tmp_path / name).read_bytes()


def test_images_without_a_prompt_have_seed_and_bundle(tmp_path: Path) -> None:
    assert call("generate", "digits", "-o", tmp_path / "out.png", "--seed", "7", "--labels", "3").exit_code == 0
    with Image.open(tmp_path / "out.png") as image:
        assert {"seed", "steps", "bundle", "bundle_sha256", "software"} == set(image.text)  # type: ignore[attr-defined]  # of PNG


def test_encoded_prompts_in_a_file(guided: Path, tmp_path: Path) -> None:
    with Generator(guided) as generator:
        encoded: dict[str, Any] = generator.encode_prompt("a cat", "ugly")
    np.savez(tmp_path / "prompt.npz", **encoded)
    result = call("generate", guided, "-o", tmp_path / "out.png", "--prompt-embeds", tmp_path / "prompt.npz", "--seed", "7")
    assert result.exit_code == 0, result.output
    expect_image(tmp_path / "out.png", [7], ["a cat"], ["ugly"])


def test_a_long_prompt_is_cut_off_with_a_warning(bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = call("generate", bundle, "-o", tmp_path / "out.png", "--prompt", LONG, "--seed", "7", "--num-images", "3", "--batch-size", "1")
    assert result.exit_code == 0, result.output
    assert "prompt must have at most 12 tokens; its end was cut off: " in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Error: the bundle 'text' needs a prompt: --prompt …, or its embeddings: prompt_embeds"),
        (["--prompt", LONG, "--strict-prompt"], "Error: --prompt must have at most 12 tokens, and this is beyond them: "),
        (["--prompt", "a", "--negative-prompt", "b"], "Error: --negative-prompt was given, but the bundle 'text' uses none. Leave it out."),
        (["--prompt", "a", "--prompts", "-"], "Error: --prompt and --prompts cannot be used together."),
        (["--prompt", "a", "--prompt", "b", "--seed", "1,2,3"], "Error: --seed must be one for all samples, or one for each of the 2, got 3"),
        (["--prompt", "a \udcff"], r"Error: --prompt must be valid Unicode, got half of a surrogate pair, \udcff, at character 2."),
        (["--prompts", "nowhere.txt"], "Error: cannot read prompts from 'nowhere.txt': No such file or directory."),
        (["--prompts", "."], "Error: cannot read prompts from '.': Is a directory."),
        (["--prompts", "empty.txt"], "Error: 'empty.txt' must have at least one prompt, one per line"),
        (["--prompts", "latin.txt"], "Error: --prompts must be UTF-8, got the byte 0xfc in line 2 of 'latin.txt'. Save the file as UTF-8."),
        (["--prompts", "large.txt"], "Error: cannot read prompts from 'large.txt': it has more than 1 MiB."),
    ],
)
def test_options_that_cannot_be_used(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompt_files, "MAX_BYTES", 1 << 20)
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes("a cat\nüber\n".encode("latin-1"))
    Path("large.txt").write_bytes(b"a" * (1 << 21))
    before = tree(tmp_path)
    result = call("generate", bundle, "-o", "out.png", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert "Traceback" not in result.output
    assert tree(tmp_path) == before


def test_inspect_shows_the_text_encoder(guided: Path) -> None:
    shown = " ".join(call("inspect", guided).stdout.split())
    assert "text encoder tokenizer.json, up to 12 tokens, with a negative prompt → prompt_embeds, prompt_attention_mask, negative_prompt_embeds" in shown
    assert "weights in fp32" in shown


def test_smoke_needs_no_prompt(bundle: Path) -> None:
    result = call("smoke", bundle)
    assert result.exit_code == 0, result.output


def test_texts_that_a_png_cannot_hold(bundle: Path, tmp_path: Path) -> None:
    with Generator(bundle) as generator:
        samples = generator(prompt="a cat", seed=7)
    samples.save(tmp_path / "out.png", metadata={"prompt": "a\0b", "Kommentar": "ü 猫"})
    with Image.open(io.BytesIO((tmp_path / "out.png").read_bytes())) as image:
        assert image.text == {"prompt": "a\N{REPLACEMENT CHARACTER}b", "Kommentar": "ü 猫"}  # type: ignore[attr-defined]  # of PNG
    for name, texts, message in (
        ("out.jpg", {"prompt": "a"}, "metadata is stored in PNG files only, got JPEG. Use .png"),
        ("out.png", {"": "a"}, "metadata must have keywords of 1 to 79 Latin-1 characters"),
        ("out.png", {"猫": "a"}, "metadata must have keywords of 1 to 79 Latin-1 characters"),
        ("out.png", {"k" * 80: "a"}, "metadata must have keywords of 1 to 79 Latin-1 characters"),
        ("out.png", {"prompt": "\ud800"}, "texts of valid Unicode, got 'prompt'"),
        ("out.png", {"seed": 7}, "metadata must be strings by keyword, got seed: 7"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            samples.save(tmp_path / name, metadata=texts)  # type: ignore[arg-type]  # the point of the test
