"""A tokenizer of a bundle, read by Hugging Face's ``tokenizers`` (the extra ``text``): from prompts to token ids and masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.text_spec import TextTokenizer
from scm_runtime.common.files import read_limited
from scm_runtime.common.installed import install_extras
from scm_runtime.common.message_text import first_line
from scm_runtime.errors import BundleSchemaError, MissingDependencyError

MAX_BYTES = 64 << 20
"""Largest ``tokenizer.json`` that is read. Those of Gemma have up to 34 MB."""


class Tokens(NamedTuple):
    """Token ids and masks of N prompts."""

    ids: NDArray[np.int64]
    """``[N, max_length]``"""
    mask: NDArray[np.int64]
    """``[N, max_length]``, 1 for tokens and 0 for padding."""
    cut: dict[str, str]
    """What was cut off, by prompt, of prompts that are too long."""


class PromptTokenizer:
    """An open tokenizer. Several threads may use it at once."""

    def __init__(self, path: Path, spec: TextTokenizer) -> None:
        """Read a tokenizer file.

        Args:
            path: the file, in the JSON format of Hugging Face tokenizers.
            spec: the manifest's entry for it.

        Raises:
            MissingDependencyError: ``tokenizers`` is not installed.
            BundleSchemaError: the file cannot be read, is not a tokenizer, or does not fit the manifest.
        """
        self._path, self._spec = path, spec
        self._tokenizer = _open(path, _load_tokenizers())
        with self._errors("it cannot be used"):
            largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
            special = int(self._tokenizer.num_special_tokens_to_add(is_pair=False))
        if largest >= spec.vocab_size:
            raise self._error(f"its token ids must be below the {spec.vocab_size} rows of the text encoder's embedding, got {largest}")
        if special >= spec.max_length:
            raise self._error(f"max_length must leave room for a prompt beside its {special} special tokens, got {spec.max_length}")
        with self._errors("it cannot be used"):
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(spec.max_length, direction="right")

    def encode(self, prompts: Sequence[str]) -> Tokens:
        """Return the token ids and masks of prompts of valid Unicode; empty ones are valid.

        Raises:
            BundleSchemaError: the tokenizer fails, or makes a token id that the text encoder does not have.
        """
        spec = self._spec
        ids = np.full((len(prompts), spec.max_length), spec.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        rows: dict[str, int] = {}
        cut: dict[str, str] = {}
        for row, prompt in enumerate(prompts):
            if (first := rows.setdefault(prompt, row)) != row:
                ids[row], mask[row] = ids[first], mask[first]
                continue
            text = spec.prefix + self._prepared(prompt)
            with self._errors("it cannot encode a prompt"):
                encoded = self._tokenizer.encode(text)  # one by one: encode_batch starts threads, which a fork does not survive
            if encoded.overflowing:
                kept = max((end for _, end in encoded.offsets), default=0)
                cut[prompt] = text[max(kept, len(spec.prefix)) :]
            tokens = encoded.ids
            if len(tokens) > spec.max_length:
                raise self._error(f"it must return at most {spec.max_length} tokens for a prompt, got {len(tokens)}")
            place = slice(0, len(tokens)) if spec.padding_side == "right" else slice(spec.max_length - len(tokens), None)
            ids[row, place] = tokens
            mask[row, place] = 1
        if ids.max(initial=0) >= spec.vocab_size:
            raise self._error(f"its token ids must be below the {spec.vocab_size} rows of the text encoder's embedding, got {ids.max()}")
        return Tokens(ids, mask, cut)

    def _prepared(self, prompt: str) -> str:
        text = prompt.lower() if self._spec.lowercase else prompt
        return text.strip() if self._spec.strip else text

    @contextmanager
    def _errors(self, problem: str) -> Iterator[None]:
        """Within the block, turn the package's errors into BundleSchemaError."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # they have no common type, and a panic of the package is not an Exception
            raise self._error(f"{problem}: {first_line(error)}") from error

    def _error(self, reason: str) -> BundleSchemaError:
        return BundleSchemaError(f"'{self._path}' does not fit the bundle: {reason}. Export the checkpoint again.")


def _load_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingDependencyError(
            f"a prompt requires the package tokenizers ({error}). Install it, or give prompt_embeds instead:\n  {install_extras('text')}"
        ) from error
    return tokenizers


def _open(path: Path, tokenizers: Any) -> Any:
    try:
        return tokenizers.Tokenizer.from_buffer(read_limited(path, MAX_BYTES))
    except OSError as error:
        raise BundleSchemaError(f"cannot read '{path}': {error.strerror or error}. Export the checkpoint again.") from error
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the package's errors have no common type, and a panic in it is not an Exception
        raise BundleSchemaError(f"'{path}' is not a tokenizer that tokenizers {tokenizers.__version__} can read: {first_line(error)}.") from error
