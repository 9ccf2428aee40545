"""The toy bundle with a text encoder: a small byte-level tokenizer, and a text graph that NumPy can recompute."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import toy_bundle
from scm_runtime.bundle.checksums import sha256
from scm_runtime.bundle.manifest import MANIFEST, FileEntry, TextSpec, TextTokenizer, read_manifest

MAX_LENGTH, PREFIX = 12, "draw: "
CORPUS = ["a lighthouse at dusk", "a cat on a mat", "draw: a dog in the rain", "the quick brown fox", "über die Brücke", "猫が座る", "прекрасный вид"]


@cache
def tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer, as CLIP's and GPT-2's: <s> prompt </s>, padded with <pad>."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return made


def vocab_size() -> int:
    """Return the number of token ids."""
    return tokenizer().get_vocab_size()


# Embedding k of token i is sin(i + k), and the graph adds the position divided by ten. The encoder's mask becomes the conditioning's.
TEXT = f"""text (int64[batch,length] input_ids, int64[batch,length] attention_mask) =>
        (float[batch,length,{toy_bundle.WIDTH}] prompt_embeds, int64[batch,length] prompt_attention_mask) {{
    ids = Cast<to=1>(input_ids)
    last = Constant<value_ints=[-1]>()
    ids3 = Unsqueeze(ids, last)
    zero = Constant<value_float=0.0>()
    width = Constant<value_float={toy_bundle.WIDTH}.0>()
    one = Constant<value_float=1.0>()
    columns = Range(zero, width, one)
    angles = Add(ids3, columns)
    waves = Sin(angles)
    length = Constant<value_float={MAX_LENGTH}.0>()
    positions = Range(zero, length, one)
    spread = Constant<value_ints=[1, {MAX_LENGTH}, 1]>()
    places = Reshape(positions, spread)
    tenth = Constant<value_float=0.1>()
    shift = Mul(places, tenth)
    prompt_embeds = Add(waves, shift)
    prompt_attention_mask = Identity(attention_mask)
}}"""


def text_tokenizer(**changed: Any) -> TextTokenizer:
    """Return the manifest's entry for the tokenizer, with some fields changed."""
    fields = {
        "file": "tokenizer.json",
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "max_length": MAX_LENGTH,
        "pad_token_id": 0,
        "vocab_size": vocab_size(),
    }
    return TextTokenizer(**{**fields, **changed})


def write_prompt_bundle(folder: Path, *, negative: bool = False, text: str = TEXT, spec: TextSpec | None = None, tokenizer_file: bytes | None = None) -> Path:
    """Write the toy bundle with a text encoder, and return its folder.

    Args:
        folder: the bundle's folder.
        negative: Let the model use a negative prompt: the step subtracts what it adds for the prompt.
        text: The text graph.
        spec: The manifest's entry ``text``.
        tokenizer_file: Contents of ``tokenizer.json``.
    """
    toy_bundle.write_text_bundle(folder, extras=(), graphs={"step": _negative_step()} if negative else None)
    (folder / "text.fp32.onnx").write_bytes(onnx.parser.parse_model(toy_bundle.HEADER + text).SerializeToString())
    (folder / "tokenizer.json").write_bytes(tokenizer().to_str().encode() if tokenizer_file is None else tokenizer_file)
    manifest = read_manifest(folder)
    outputs = ("prompt_embeds", "prompt_attention_mask")
    negatives = tuple(f"negative_{name}" for name in outputs) if negative else ()
    conditioning = [*manifest.conditioning, *(msgspec.structs.replace(item, name=f"negative_{item.name}") for item in manifest.conditioning if item.is_array)]
    made = msgspec.structs.replace(
        manifest,
        conditioning=tuple(conditioning) if negative else manifest.conditioning,
        files={path.name: FileEntry(size=path.stat().st_size, sha256=sha256(path)) for path in sorted(folder.iterdir()) if path.name != MANIFEST},
        text=spec or TextSpec(tokenizers=(text_tokenizer(),), outputs=outputs, negative_outputs=negatives),
    )
    (folder / MANIFEST).write_bytes(made.to_json())
    return folder


def _negative_step() -> str:
    """Return the toy step with negative embeddings: text becomes text - negative text."""
    start, end = toy_bundle.STEP.index("    m = Cast"), toy_bundle.STEP.index("    column = ")
    pooled = toy_bundle.STEP[start:end]
    names = {name: f"not_{name}" for name in re.findall(r"^    (\w+) = ", pooled, re.MULTILINE)} | {"prompt_embeds": "negative_prompt_embeds"}
    names["prompt_attention_mask"] = "negative_prompt_attention_mask"
    negated = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), pooled)
    inputs = toy_bundle.STEP[:start].replace(
        "float[batch] guidance_scale",
        f"float[batch,tokens,{toy_bundle.WIDTH}] negative_prompt_embeds, int64[batch,tokens] negative_prompt_attention_mask, float[batch] guidance_scale",
    )
    rest = toy_bundle.STEP[end:].replace("gt = Mul(g, text)", "difference = Sub(text, not_text)\n    gt = Mul(g, difference)")
    return inputs + pooled + negated + rest


# ----------------------------------------------------------------------------
# The same in NumPy.


def encode(prompts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the embeddings and masks of prompts: ``[N, MAX_LENGTH, WIDTH]`` and ``[N, MAX_LENGTH]``."""
    ids, mask = np.zeros((len(prompts), MAX_LENGTH), np.int64), np.zeros((len(prompts), MAX_LENGTH), np.int64)
    for row, prompt in enumerate(prompts):
        tokens = tokenizer().encode(prompt, add_special_tokens=False).ids[: MAX_LENGTH - 2]
        ids[row, : len(tokens) + 2], mask[row, : len(tokens) + 2] = [1, *tokens, 2], 1
    embeds = np.sin(ids[..., None].astype(np.float32) + np.arange(toy_bundle.WIDTH, dtype=np.float32))
    return embeds + np.arange(MAX_LENGTH, dtype=np.float32)[:, None] * np.float32(0.1), mask


def sample(seeds: Sequence[int], prompts: Sequence[str], negatives: Sequence[str] | None = None, steps: int = 2) -> NDArray[np.float32]:
    """Compute the latents of prompts ``[N, *SAMPLE_SHAPE]``; with ``negatives``, those of the bundle that uses negative prompts."""
    latents = toy_bundle.sample(seeds, *encode(prompts), steps=steps)
    if negatives is None:
        return latents
    guided, unguided = (toy_bundle.sample(seeds, *encode(negatives), guidance=guidance, steps=steps) for guidance in (toy_bundle.GUIDANCE, 0))
    return latents - (guided - unguided)
