"""CLIP's text encoders: one, as in Stable Diffusion, or two with pooled embeddings, as in Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scm_export.checkpoints import DiffusersFolder
from scm_export.errors import CheckpointError
from scm_export.families.text.encoders import WITHOUT_TEXT, check_class, check_sizes, has_components, keeps_fp32, make_encoders
from scm_export.families.text.tokenizers import describe_tokenizer, read_tokenizer, tokenize, tokenizers_file
from scm_export.lora import TEXT_ENCODER, TEXT_ENCODER_2, Component, Lora, merge_loras
from scm_export.model import TextEncoder
from scm_export.precision import Precision
from scm_runtime.bundle.text_spec import TextSpec, TextTokenizer

MODEL, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")


class LastState(nn.Module):
    """One encoder: its last hidden state, after the final norm, float32 ``[N, tokens, D]``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = Precision(network, keeps_fp32)

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        state: Tensor = self.network(input_ids).last_hidden_state
        return (state,)


class PenultimateStates(nn.Module):
    """Two encoders: the hidden states before the last layer of both, ``[N, tokens, D + D']``, and the projected state of the second, ``[N, P]``."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = Precision(first, keeps_fp32), Precision(second, keeps_fp32)

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.first(input_ids, output_hidden_states=True), self.second(input_ids_2, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def clip_text(folder: DiffusersFolder, size: int, negative_outputs: tuple[str, ...] = (), loras: Sequence[Lora] = ()) -> TextEncoder | None:
    """Return the CLIP encoder of a folder, as StableDiffusionPipeline uses it.

    Args:
        folder: with ``text_encoder`` and ``tokenizer``.
        size: of ``prompt_embeds``, float32 ``[N, 77, size]``.
        negative_outputs: name of the conditioning input that a negative prompt provides, or nothing.
        loras: LoRA files to add to the weights.

    Returns:
        The encoder; None if the folder has neither ``text_encoder`` nor ``tokenizer``.

    Raises:
        CheckpointError: the encoder is of another kind or size, or does not fit its tokenizer, or cannot be read.
        MissingDependencyError: transformers is not installed.
    """
    if not has_components(folder, "text_encoder", "tokenizer"):
        return None
    check_class(folder, "text_encoder", (MODEL,))
    network, original = _encoders(folder, TEXT_ENCODER, loras)
    check_sizes(folder, {"prompt_embeds": network.config.hidden_size}, {"prompt_embeds": size})
    tokenizer, described = _tokenizer(folder, "tokenizer", network.config, "")

    @torch.no_grad()
    def reference(prompts: Sequence[str]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        ids = tokenize(tokenizer, list(prompts), described.max_length).input_ids
        return (ids,), (original(ids).last_hidden_state,)

    spec = TextSpec(tokenizers=(described,), outputs=("prompt_embeds",), negative_outputs=negative_outputs, licence=folder.licence)
    return TextEncoder(LastState(network), spec, {described.file: tokenizers_file(tokenizer)}, reference)


def clip_pair_text(
    folder: DiffusersFolder, size: int, pooled_size: int, negative_outputs: tuple[str, ...] = (), loras: Sequence[Lora] = ()
) -> TextEncoder | None:
    """Return the two CLIP encoders of a folder, as StableDiffusionXLPipeline uses them.

    Args:
        folder: with ``text_encoder``, ``text_encoder_2`` and their tokenizers.
        size: of ``prompt_embeds``, float32 ``[N, 77, size]``.
        pooled_size: of ``pooled_prompt_embeds``, float32 ``[N, pooled_size]``.
        negative_outputs: names of the conditioning inputs that a negative prompt provides.
        loras: LoRA files to add to the weights.

    Returns:
        The encoders; None if the folder has none of these components.

    Raises:
        CheckpointError: an encoder is of another kind or size, or does not fit its tokenizer, or cannot be read.
        MissingDependencyError: transformers is not installed.
    """
    if not has_components(folder, "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
        return None
    check_class(folder, "text_encoder", (MODEL,))
    check_class(folder, "text_encoder_2", (PROJECTED,))
    (first, original), (second, original_2) = _encoders(folder, TEXT_ENCODER, loras), _encoders(folder, TEXT_ENCODER_2, loras)
    found = {"prompt_embeds": first.config.hidden_size + second.config.hidden_size, "pooled_prompt_embeds": second.config.projection_dim}
    check_sizes(folder, found, {"prompt_embeds": size, "pooled_prompt_embeds": pooled_size})
    (tokenizer, described), (tokenizer_2, described_2) = (
        _tokenizer(folder, f"tokenizer{suffix}", one.config, suffix) for one, suffix in ((first, ""), (second, "_2"))
    )
    if described.max_length != described_2.max_length:
        raise CheckpointError(
            f"both tokenizers of {folder.describe()} must have one length, since the embeddings are concatenated, got {described.max_length} and "
            f"{described_2.max_length}. {WITHOUT_TEXT}"
        )

    @torch.no_grad()
    def reference(prompts: Sequence[str]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        ids, ids_2 = (tokenize(one, list(prompts), described.max_length).input_ids for one in (tokenizer, tokenizer_2))
        states, states_2 = original(ids, output_hidden_states=True), original_2(ids_2, output_hidden_states=True)
        return (ids, ids_2), (torch.cat([states.hidden_states[-2], states_2.hidden_states[-2]], dim=-1), states_2.text_embeds)

    outputs = ("prompt_embeds", "pooled_prompt_embeds")
    zeros = bool(negative_outputs) and folder.index.get("force_zeros_for_empty_prompt", True) is True
    spec = TextSpec(tokenizers=(described, described_2), outputs=outputs, negative_outputs=negative_outputs, zero_negative=zeros, licence=folder.licence)
    files = {described.file: tokenizers_file(tokenizer), described_2.file: tokenizers_file(tokenizer_2)}
    return TextEncoder(PenultimateStates(first, second), spec, files, reference)


def _encoders(folder: DiffusersFolder, component: Component, loras: Sequence[Lora]) -> tuple[Any, Any]:
    network, original = make_encoders(folder, component, folder.classes[component], attention="sdpa", buffers=_set_positions, rename=_rename)
    merge_loras(loras, network, component)  # both have the same weights
    return network, original


def _set_positions(network: Any, config: Any) -> None:
    if getattr(config, "use_attention_mask", False):
        raise ValueError("use_attention_mask is not supported")
    model = getattr(network, "text_model", network)
    model.embeddings.position_ids = torch.arange(config.max_position_embeddings).expand((1, -1))


def _rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names of current transformers. Older files have the positions as a tensor, and a prefix in the model without projection."""
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("embeddings.position_ids")}
    projected = any(name.startswith("text_projection.") for name in weights)
    return weights if projected else {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}


def _tokenizer(folder: DiffusersFolder, component: str, config: Any, suffix: str) -> tuple[Any, TextTokenizer]:
    tokenizer = read_tokenizer(folder, component, TOKENIZERS)
    length = min(tokenizer.model_max_length, config.max_position_embeddings)
    return tokenizer, describe_tokenizer(tokenizer, config.vocab_size, f"tokenizer{suffix}.json", f"input_ids{suffix}", length)
