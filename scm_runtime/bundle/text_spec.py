"""The part of the manifest that describes a bundle's text encoder: how a prompt becomes token ids, and what the text graph makes of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, Struct

if TYPE_CHECKING:
    from scm_runtime.bundle.manifest import Conditioning

MAX_TOKENS = 65_536  # of one prompt
MAX_PREFIX = 65_536  # characters

TokenCount = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
InputName = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,99}\Z")]
Outputs = Annotated[tuple[str, ...], Meta(max_length=8)]


class TextTokenizer(Struct, kw_only=True):
    """One tokenizer, and the two inputs of the text graph that it provides, int64 ``[N, max_length]`` each."""

    file: str
    """In the JSON format of Hugging Face tokenizers. Its post-processor adds the special tokens."""
    input_ids: InputName
    """Input of the text graph for the token ids."""
    attention_mask: InputName | None = None
    """Input for the mask, 1 for tokens and 0 for padding; None if the encoder reads no mask."""
    max_length: TokenCount
    """Tokens of every prompt, with its special tokens and its prefix: shorter ones are padded, longer ones cut at the right, before the special tokens."""
    pad_token_id: TokenId
    padding_side: Literal["right", "left"] = "right"
    vocab_size: Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
    """Rows of the encoder's embedding. All token ids are below it."""
    prefix: Annotated[str, Meta(max_length=MAX_PREFIX)] = ""
    """Text before every prompt, for instance an instruction."""
    strip: bool = False
    """White space around a prompt is removed."""
    lowercase: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs of the text graph."""
        return (self.input_ids,) if self.attention_mask is None else (self.input_ids, self.attention_mask)


class TextSpec(Struct, kw_only=True):
    """The text encoder of a bundle: its tokenizers, and the outputs of the text graph."""

    tokenizers: Annotated[tuple[TextTokenizer, ...], Meta(min_length=1, max_length=4)]
    outputs: Annotated[Outputs, Meta(min_length=1)]
    """Conditioning inputs that a prompt provides, in the order of the graph's outputs."""
    negative_outputs: Outputs = ()
    """Conditioning inputs that the negative prompt provides, in the same order; empty if the model uses none."""
    zero_negative: bool = False
    """Without a negative prompt its embeddings are zeros, not those of an empty prompt."""
    weights_dtype: str = "fp32"
    """"fp32", "fp16", "bf16", "int8" or "int4"."""
    licence: str | None = None

    def validate(self, conditioning: Sequence[Conditioning], files: Collection[str]) -> None:
        """Check what types alone cannot express against the rest of the manifest. Raises ValueError."""
        needed = {"text.fp32.onnx", *(tokenizer.file for tokenizer in self.tokenizers)}
        if missing := sorted(needed - set(files)):
            raise ValueError(f"files must list the text graph and the tokenizers, missing {', '.join(missing)}")
        _check_different("tokenizers must have different inputs", [name for tokenizer in self.tokenizers for name in tokenizer.inputs])
        for tokenizer in self.tokenizers:
            if tokenizer.pad_token_id >= tokenizer.vocab_size:
                raise ValueError(f"pad_token_id must be below the vocab_size {tokenizer.vocab_size}, got {tokenizer.pad_token_id}")
        _check_different("outputs and negative_outputs must be different inputs", [*self.outputs, *self.negative_outputs])
        known = {item.name: item for item in conditioning if item.is_array}
        if unknown := sorted({*self.outputs, *self.negative_outputs} - known.keys()):
            raise ValueError(f"outputs of the text encoder must be conditioning of kind 'embedding' or 'mask', got {', '.join(unknown)}")
        if self.negative_outputs:
            self._check_negative(known)

    def _check_negative(self, known: Mapping[str, Conditioning]) -> None:
        if len(self.negative_outputs) != len(self.outputs):
            raise ValueError(f"negative_outputs must be as many as outputs, {len(self.outputs)}, or none; got {len(self.negative_outputs)}")
        for name, negative in zip(self.outputs, self.negative_outputs, strict=True):
            if known[name].describe() != known[negative].describe():
                raise ValueError(f"{negative} must have the dtype and shape of {name}, {known[name].describe()}; got {known[negative].describe()}")


def _check_different(expected: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{expected}, got {', '.join(names)}")
