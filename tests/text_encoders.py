"""Tiny text encoders with random weights and trained tokenizers, as diffusers saves them, and strings of many scripts to tokenize."""

from __future__ import annotations

import inspect
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import SanaSprintPipeline
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# First and last characters of ranges: Latin, Latin with marks, Greek, Cyrillic, Hebrew, Arabic, Devanagari, Thai, Hangul, kana, Han, symbols, emoji,
# combining marks, control characters, mathematical letters.
RANGES = (
    *((0x20, 0x7E), (0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x621, 0x64A), (0x904, 0x939), (0xE01, 0xE30)),
    *((0xAC00, 0xB0FF), (0x3041, 0x30FA), (0x4E00, 0x52FF), (0x2000, 0x206F), (0x1F300, 0x1F64F), (0x300, 0x36F), (0x1, 0x1F), (0x1D400, 0x1D4FF)),
)
WORDS = (
    "a photo of the lighthouse at dusk, oil painting of cats; it's 1920s style — détail élevé, маяк на закате, 灯台の夕暮れ <|endoftext|> <bos> </s> "
    "User Prompt:"
)
SPECIAL_STRINGS = (
    *("", " ", "\t\n ", "a", "A" * 400, "word " * 400, "x\u200dy", "👩‍👩‍👧‍👦 family", "🏳️‍🌈", "e\u0301", "ﬁ ligature", "İstanbul", "ẞ straße"),
    *("<|startoftext|>", "<|endoftext|> after", "don't we'll they've", "0123456789", "  two  spaces  ", "NUL\x00byte", "\ufeffBOM", "ยินดีต้อนรับ", "नमस्ते"),
    *("السلام عليكم", "שלום עולם", "안녕하세요", "こんにちは", "你好，世界", "Ωμέγα", "<pad>", "</s> <unk> <eos>", "▁under", "\u2028line", "…", "½ ² ①"),
)


def strings(count: int = 500) -> list[str]:
    """Return different strings, the same in every run."""
    generator, words = random.Random(0), WORDS.split()
    made = dict.fromkeys(SPECIAL_STRINGS)
    while len(made) < count:
        parts = []
        for _ in range(generator.randint(1, 9)):
            first, last = generator.choice(RANGES)
            parts += ["".join(chr(generator.randint(first, last)) for _ in range(generator.randint(1, 12))), generator.choice(words)]
        made["".join(part + generator.choice(("", " ", "  ")) for part in parts)] = None
    return list(made)


def save_clip(folder: Path, suffix: str = "", *, hidden: int = 24, projection: int | None = None, pad_token: str = "<|endoftext|>", seed: int = 0) -> None:
    """Write ``text_encoder`` and ``tokenizer``, or with a suffix ``text_encoder_2`` and ``tokenizer_2``. The tokenizer is saved as published ones are."""
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(_corpus(), trainer)
    model = json.loads(bpe.to_str())["model"]
    vocabulary: dict[str, int] = model["vocab"]
    for letter in pre_tokenizers.ByteLevel.alphabet():
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    path = folder / f"tokenizer{suffix}"
    path.mkdir(parents=True)
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad_token}
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}))
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection or 16,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
        hidden_act="gelu" if suffix else "quick_gelu",
    )
    _save(transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel, config, folder / f"text_encoder{suffix}", seed)


def gemma_instruction() -> list[str]:
    """The instruction that SanaSprintPipeline puts before every prompt."""
    instruction: list[str] = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
    return instruction


def save_gemma(folder: Path, *, hidden: int = 24, heads: int = 2) -> None:
    """Write ``text_encoder``, a Gemma 2 with a window shorter than the instruction, and ``tokenizer``."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, limit_alphabet=200, show_progress=False)
    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    bpe.train_from_iterator([*_corpus(), *gemma_instruction() * 9], trainer)  # so that it takes few tokens
    model = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]
    tokenizer = transformers.GemmaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    config = transformers.Gemma2Config(
        vocab_size=900,
        hidden_size=hidden,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=12,
        query_pre_attn_scalar=12,
        sliding_window=40,
    )
    _save(transformers.Gemma2Model, config, folder / "text_encoder", 0)


def save_t5(folder: Path, *, umt5: bool = False, hidden: int = 24) -> None:
    """Write ``text_encoder``, an encoder of T5 or umT5, and ``tokenizer``."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    unigram.train_from_iterator([WORDS, WORDS.lower(), *SPECIAL_STRINGS[4:6]], trainer)
    vocabulary = [tuple(entry) for entry in json.loads(unigram.to_str())["model"]["vocab"]]
    transformers.T5Tokenizer(vocab=vocabulary, extra_ids=10).save_pretrained(folder / "tokenizer")
    size = len(vocabulary) + 32
    sizes = {"vocab_size": size, "d_model": hidden, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}
    settings: dict[str, Any] = {**sizes, "feed_forward_proj": "gated-gelu"}
    if umt5:
        _save(transformers.UMT5EncoderModel, transformers.UMT5Config(**settings), folder / "text_encoder", 0)
    else:
        _save(transformers.T5EncoderModel, transformers.T5Config(**settings), folder / "text_encoder", 0)


def write_index(folder: Path, pipeline: str, **components: str) -> Path:
    """Write ``model_index.json``, which names the class of each component."""
    libraries = {name: "transformers" if "text" in name or "token" in name else "diffusers" for name in components}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **{name: [libraries[name], cls] for name, cls in components.items()}}))
    return folder


def _save(cls: Any, config: Any, folder: Path, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = cls(config).eval()
        for parameter in network.parameters():  # transformers' initial values are so small that every layer is almost linear
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    network.half().float().save_pretrained(folder)


def _corpus() -> list[str]:
    return [WORDS, WORDS.lower(), *(text for text in strings(120) if text)]
