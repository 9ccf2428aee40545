"""The encoders of T5 and umT5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scm_export.checkpoints import DiffusersFolder
from scm_export.families.text.encoders import check_class, check_sizes, has_components, keeps_fp32, make_encoders
from scm_export.families.text.tokenizers import describe_tokenizer, read_tokenizer, tokenize, tokenizers_file
from scm_export.model import TextEncoder
from scm_export.precision import Precision
from scm_runtime.bundle.text_spec import TextSpec

MODELS = ("T5EncoderModel", "UMT5EncoderModel")
TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast")


class MaskedStates(nn.Module):
    """The last hidden state, float32 ``[N, tokens, D]``, and the mask that was given, int64 ``[N, tokens]``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = Precision(network, keeps_fp32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        added = torch.where(attention_mask[:, None, None] == 1, 0.0, torch.finfo(self.network.compute_dtype).min)
        state: Tensor = self.network(input_ids, attention_mask=added).last_hidden_state
        return state, (attention_mask == 1).to(torch.int64)  # an output of a graph cannot be an input


def t5_text(folder: DiffusersFolder, size: int, max_length: int, *, strip: bool = False, lowercase: bool = False) -> TextEncoder | None:
    """Return the T5 or umT5 encoder of a folder.

    Its outputs are ``prompt_embeds``, float32 ``[N, max_length, size]``, and ``prompt_attention_mask``, int64 ``[N, max_length]``.

    Args:
        folder: with the components ``text_encoder`` and ``tokenizer``.
        size: of the embeddings.
        max_length: tokens per prompt.
        strip: whether the pipeline removes whitespace around a prompt.
        lowercase: whether the pipeline converts prompts to lower case.

    Returns:
        The encoder; None if the folder has neither component.

    Raises:
        CheckpointError: the encoder is of another kind or size, or does not fit its tokenizer, or cannot be read.
        MissingDependencyError: transformers is not installed.
    """
    if not has_components(folder, "text_encoder", "tokenizer"):
        return None
    class_name = check_class(folder, "text_encoder", MODELS)
    network, original = make_encoders(folder, "text_encoder", class_name, part="encoder", rename=_rename)
    config = folder.config("text_encoder")
    check_sizes(folder, {"prompt_embeds": config["d_model"]}, {"prompt_embeds": size})
    tokenizer = read_tokenizer(folder, "tokenizer", TOKENIZERS)
    described = describe_tokenizer(
        tokenizer,
        config["vocab_size"],
        "tokenizer.json",
        "input_ids",
        max_length,
        attention_mask="attention_mask",
        strip=strip,
        lowercase=lowercase,
    )

    @torch.no_grad()
    def reference(prompts: Sequence[str]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        cased = [prompt.lower() if lowercase else prompt for prompt in prompts]
        tokens = tokenize(tokenizer, [prompt.strip() if strip else prompt for prompt in cased], max_length)
        return (tokens.input_ids,), (original(**tokens).last_hidden_state, tokens.attention_mask)

    spec = TextSpec(tokenizers=(described,), outputs=("prompt_embeds", "prompt_attention_mask"), licence=folder.licence)
    return TextEncoder(MaskedStates(network), spec, {described.file: tokenizers_file(tokenizer)}, reference)


def _rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the encoder alone. Its embeddings are stored once, under the name that the decoder shares, or twice."""
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in weights.items() if name.startswith("encoder.")}
    return encoder | {"embed_tokens.weight": weights["shared.weight"]} if "shared.weight" in weights else encoder
