"""Comparison of a bundle's text encoder with the original's: token ids, which must be equal, and embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scm_export.errors import VerificationError
from scm_export.model import TextEncoder
from scm_runtime.bundle.text_spec import TextSpec
from scm_runtime.text.tokenizer import PromptTokenizer

PROMPTS = (
    "a lighthouse at dusk",
    "",
    "  Ein Leuchtturm, 4K — 灯台の夕暮れ, маяк на закате; 등대 🌅👩‍👩‍👧 ",
    "a very long prompt that does not fit, " * 100,
)


@dataclass(frozen=True)
class ReferenceText:
    """What the original's tokenizers and encoders make of ``PROMPTS``."""

    ids: tuple[NDArray[np.int64], ...]  #   [N, max_length] for each tokenizer
    outputs: tuple[NDArray[Any], ...]  #    [N, ...]


def compute_text(text: TextEncoder, progress: Callable[[str], None]) -> ReferenceText:
    """Encode ``PROMPTS`` with the original."""
    assert text.reference is not None
    progress("encoding prompts in PyTorch")
    ids, outputs = text.reference(PROMPTS)
    return ReferenceText(tuple(one.numpy() for one in ids), tuple(one.float().numpy() if one.is_floating_point() else one.numpy() for one in outputs))


def text_inputs(folder: Path, spec: TextSpec, prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Tokenize prompts as the runtime does, with the tokenizers of a bundle. Returns the inputs of its text graph, int64 ``[N, max_length]`` by name."""
    inputs = {}
    for described in spec.tokenizers:
        tokens = PromptTokenizer(folder / described.file, described).encode(prompts)
        inputs[described.input_ids] = tokens.ids
        if described.attention_mask is not None:
            inputs[described.attention_mask] = tokens.mask
    return inputs


def check_ids(folder: Path, spec: TextSpec, expected: ReferenceText) -> dict[str, NDArray[np.int64]]:
    """Tokenize ``PROMPTS`` with a bundle's tokenizers. Returns the inputs of its text graph.

    Raises:
        VerificationError: the ids are not those of the original's tokenizers.
    """
    inputs = text_inputs(folder, spec, PROMPTS)
    for described, ids in zip(spec.tokenizers, expected.ids, strict=True):
        wrong = (inputs[described.input_ids] != ids).any(axis=1).nonzero()[0]
        if len(wrong):
            raise VerificationError(
                f"the tokenizer {described.file} gives other token ids than transformers for {len(wrong)} of {len(PROMPTS)} prompts, the first is "
                f"{PROMPTS[wrong[0]]!r:.60}. --no-text leaves the text encoder out"
            )
    return inputs
