"""Gemma 2 with SANA-Sprint's instruction, which asks the language model for an enhanced prompt and comes before every prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scm_export.checkpoints import DiffusersFolder
from scm_export.families.text.encoders import check_class, check_sizes, has_components, keeps_fp32, make_encoders
from scm_export.families.text.tokenizers import describe_tokenizer, read_tokenizer, tokenizers_file
from scm_export.model import TextEncoder
from scm_export.precision import Precision
from scm_runtime.bundle.text_spec import TextSpec

MODEL = "Gemma2Model"
TOKENIZERS = ("GemmaTokenizer", "GemmaTokenizerFast")
TOKENS = 300  # max_sequence_length of SanaSprintPipeline, section 3.1 of arXiv 2410.10629


class SelectedStates(nn.Module):
    """Gemma 2's last hidden state at the first and the last ``count - 1`` positions, float32 ``[N, count, D]``, and the mask there, int64 ``[N, count]``."""

    def __init__(self, network: nn.Module, count: int, sliding_window: int) -> None:
        super().__init__()
        self.network, self.count, self.window = Precision(network, keeps_fp32), count, sliding_window

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        length = input_ids.shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & (attention_mask[:, None, None] == 1)
        masks = {"full_attention": self._additive(seen), "sliding_attention": self._additive(seen & (distance < self.window))}
        state = self.network(input_ids, attention_mask=masks, use_cache=False).last_hidden_state
        selected = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(length - self.count + 1, length)])
        return state[:, selected], attention_mask[:, selected]

    def _additive(self, seen: Tensor) -> Tensor:
        # Not -infinity: padding further than the window from the last token sees nothing, and its softmax would be NaN.
        return torch.where(seen, 0.0, torch.finfo(self.network.compute_dtype).min)


def gemma_text(folder: DiffusersFolder, size: int) -> TextEncoder | None:
    """Return the Gemma 2 encoder of a folder, as SanaSprintPipeline uses it.

    Its outputs are ``prompt_embeds``, float32 ``[N, 300, size]``, and ``prompt_attention_mask``, int64 ``[N, 300]``.

    Returns:
        The encoder; None if the folder has neither ``text_encoder`` nor ``tokenizer``.

    Raises:
        CheckpointError: the encoder is of another kind or size, or does not fit its tokenizer, or cannot be read.
        MissingDependencyError: transformers is not installed.
    """
    if not has_components(folder, "text_encoder", "tokenizer"):
        return None
    check_class(folder, "text_encoder", (MODEL,))
    network, original = make_encoders(folder, "text_encoder", MODEL, buffers=_set_buffers, rename=_rename)
    config: Any = network.config
    check_sizes(folder, {"prompt_embeds": config.hidden_size}, {"prompt_embeds": size})
    tokenizer = read_tokenizer(folder, "tokenizer", TOKENIZERS)

    from diffusers import SanaSprintPipeline

    instruction: list[str] = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
    prefix = "\n".join(instruction)
    described = describe_tokenizer(
        tokenizer,
        config.vocab_size,
        "tokenizer.json",
        "input_ids",
        len(tokenizer.encode(prefix)) + TOKENS - 2,
        attention_mask="attention_mask",
        prefix=prefix,
        strip=True,
        lowercase=True,
    )
    pipeline = SanaSprintPipeline(tokenizer=tokenizer, text_encoder=original, vae=None, transformer=None, scheduler=None)

    @torch.no_grad()
    def reference(prompts: Sequence[str]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        seen: list[Tensor] = []
        with original.register_forward_pre_hook(lambda _module, args: seen.append(args[0])):
            outputs = pipeline.encode_prompt(list(prompts), device=torch.device("cpu"), max_sequence_length=TOKENS, complex_human_instruction=instruction)
        return (seen[0],), tuple(outputs)

    spec = TextSpec(tokenizers=(described,), outputs=("prompt_embeds", "prompt_attention_mask"), licence=folder.licence)
    selected = SelectedStates(network, TOKENS, config.sliding_window)
    return TextEncoder(selected, spec, {described.file: tokenizers_file(tokenizer)}, reference)


def _set_buffers(network: Any, config: Any) -> None:
    network.rotary_emb = type(network.rotary_emb)(config)
    network.embed_tokens.embed_scale = torch.tensor(network.embed_tokens.scalar_embed_scale)


def _rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the model alone: a file of Gemma2ForCausalLM has a prefix."""
    return {name.removeprefix("model."): tensor for name, tensor in weights.items() if not name.startswith("lm_head.")}
