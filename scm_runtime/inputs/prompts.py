"""Validation of the prompts that a caller gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from scm_runtime.common.checks import is_int
from scm_runtime.common.message_text import printable
from scm_runtime.errors import InvalidArgumentError

MAX_CHARACTERS = 1_000_000  # of one prompt: a tokenizer reads all of it before it is cut

Prompts = str | Sequence[str]


def read_prompts(name: str, value: object) -> str | list[str]:
    """Return the value of the argument ``name``: one prompt for all samples, or a list with one per sample.

    Raises:
        InvalidArgumentError: it is neither; or a prompt is not a string, is too long, or has half of a surrogate pair, which no tokenizer can read.
    """
    given = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(given, str):
        return _checked(name, given)
    if isinstance(given, bytes | bytearray) or not isinstance(given, Sequence):
        hint = " Decode the bytes first: prompt.decode()." if isinstance(given, bytes | bytearray) else ""
        raise InvalidArgumentError(f"{name} must be a string, or a list with one per sample, got {type(given).__name__}.{hint}")
    if not given:
        raise InvalidArgumentError(f"{name} must hold at least one prompt, got none. An empty prompt is ''.")
    return [_checked(f"{name}[{i}]", prompt) for i, prompt in enumerate(given)]


def _checked(name: str, prompt: object) -> str:
    if not isinstance(prompt, str):
        raise InvalidArgumentError(f"{name} must be a string, got {printable(prompt)} ({type(prompt).__name__})")
    if len(prompt) > MAX_CHARACTERS:
        raise InvalidArgumentError(f"{name} must have at most {MAX_CHARACTERS:,} characters, got {len(prompt):,}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"{name} must be valid Unicode, got half of a surrogate pair, {printable(prompt[error.start])}, at character {error.start}. "
            "Text that was read as UTF-8 has none: decode it again."
        ) from error
    return prompt


def check_prompt_lengths(prompts: Mapping[str, str | list[str]], seed: object, batch_size: object) -> None:
    """Raise InvalidArgumentError if lists of prompts, seeds and ``batch_size`` are not for one batch size: before the prompts are encoded, which takes time."""
    lengths = {name: len(value) for name, value in prompts.items() if isinstance(value, list)}
    if not lengths:
        return
    if isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str):
        lengths["seed"] = len(seed)
    if is_int(batch_size):
        lengths["batch_size"] = int(batch_size)  # type: ignore[call-overload]  # is_int says so
    if len(set(lengths.values())) > 1:
        listing = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise InvalidArgumentError(f"all arguments must be for one batch size, got {listing}. A single string is for all samples.")
