"""The text encoder of a bundle: token ids by its tokenizers, and embeddings by its text graph. Both are opened when the first prompt is encoded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.manifest import Manifest
from scm_runtime.bundle.text_spec import TextSpec
from scm_runtime.common.log import log
from scm_runtime.common.message_text import printable
from scm_runtime.errors import BundleError, InferenceError, InvalidArgumentError
from scm_runtime.text.tokenizer import PromptTokenizer

MAX_BATCH = 8
"""Prompts per run of the text graph: more need more memory, and are not faster on a CPU."""
MAX_KEPT = 32
"""Prompts of the latest call whose embeddings are kept for the next one."""
MAX_WARNINGS = 5
"""Prompts of one call that are quoted in the log because they are too long."""
OnLong = Literal["cut", "warn", "raise"]

TokenInputs = dict[str, NDArray[np.int64]]
"""Inputs of the text graph by name, ``[N, max_length]`` each."""
RunTextGraph = Callable[[TokenInputs], Sequence[NDArray[Any]]]
"""Runs the text graph on at most ``MAX_BATCH`` prompts."""


class TextEncoder:
    """Encodes prompts. Several threads may use it at once."""

    def __init__(self, folder: Path, manifest: Manifest, spec: TextSpec) -> None:
        """Describe an encoder; nothing is opened.

        Args:
            folder: the bundle's folder.
            manifest: the bundle's manifest.
            spec: the text encoder in it.
        """
        self._folder, self._spec = folder, spec
        self._items = [next(item for item in manifest.conditioning if item.name == name) for name in spec.outputs]
        self._lock = threading.Lock()
        self._tokenizers: tuple[PromptTokenizer, ...] = ()
        self._kept: dict[bytes, tuple[NDArray[Any], ...]] = {}  # outputs of one prompt by its token ids; replaced, never changed

    def tokenize(self, prompts: Sequence[str], *, name: str, on_long: OnLong) -> TokenInputs:
        """Return the token ids and masks of N prompts.

        Args:
            prompts: valid Unicode; empty ones are valid.
            name: of the argument with the prompts, for messages.
            on_long: what to do with prompts of more than ``max_length`` tokens: cut off the end; cut it off and quote it in a warning in the log; or raise.

        Raises:
            InvalidArgumentError: a prompt is too long.
            MissingDependencyError, BundleSchemaError: see ``PromptTokenizer``.
        """
        inputs: TokenInputs = {}
        cut: dict[str, str] = {}  # the reason by the text that was cut off: two tokenizers may cut the same
        for spec, tokenizer in zip(self._spec.tokenizers, self._opened(), strict=True):
            tokens = tokenizer.encode(prompts)
            cut |= dict.fromkeys(tokens.cut.values(), f"{name} must have at most {spec.max_length} tokens")
            inputs[spec.input_ids] = tokens.ids
            if spec.attention_mask is not None:
                inputs[spec.attention_mask] = tokens.mask
        if on_long != "cut":
            _report_cut(cut, strict=on_long == "raise")
        return inputs

    def encode(self, inputs: TokenInputs, run: RunTextGraph) -> tuple[NDArray[Any], ...]:
        """Return the outputs of the text graph for N prompts, ``[N, …]`` each. Equal prompts are encoded once.

        Raises:
            InferenceError: an output has NaN or infinity; and what ``run`` raises.
            BundleError: outputs of different prompts have different shapes.
        """
        rows: dict[bytes, list[int]] = {}
        for i in range(len(inputs[self._spec.tokenizers[0].input_ids])):
            rows.setdefault(b"".join(array[i].tobytes() for array in inputs.values()), []).append(i)
        kept, n = self._kept, sum(map(len, rows.values()))
        known = {key: kept[key] for key in rows if key in kept}
        new = [key for key in rows if key not in known]
        outputs: list[NDArray[Any]] = []

        def write(key: bytes, values: Sequence[NDArray[Any]]) -> None:
            if not outputs:
                outputs.extend(np.empty((n, *value.shape), value.dtype) for value in values)
            for name, output, value in zip(self._spec.outputs, outputs, values, strict=True):
                if value.shape != output.shape[1:]:
                    raise BundleError(f"the text encoder must return one shape of {name} for all prompts, got {list(value.shape)} and {list(output.shape[1:])}")
                output[rows[key]] = value

        for key, values in known.items():
            write(key, values)
        for start in range(0, len(new), MAX_BATCH):
            batch = new[start : start + MAX_BATCH]
            results = run({name: np.ascontiguousarray(array[[rows[key][0] for key in batch]]) for name, array in inputs.items()})
            self._check_finite(results)
            for row, key in enumerate(batch):
                write(key, [result[row] for result in results])
        self._kept = {key: tuple(output[rows[key][0]].copy() for output in outputs) for key in list(rows)[-MAX_KEPT:]}
        return tuple(outputs)

    def placeholders(self, inputs: TokenInputs) -> Sequence[NDArray[Any]]:
        """Return ones in the shapes of the outputs, to check a call without running the graph: dynamic dimensions have the length of the token ids."""
        n, length = inputs[self._spec.tokenizers[0].input_ids].shape
        return [np.ones((n, *(size if isinstance(size, int) else length for size in item.shape)), item.dtype) for item in self._items]

    def _opened(self) -> tuple[PromptTokenizer, ...]:
        with self._lock:
            if not self._tokenizers:
                self._tokenizers = tuple(PromptTokenizer(self._folder / spec.file, spec) for spec in self._spec.tokenizers)
            return self._tokenizers

    def _check_finite(self, results: Sequence[NDArray[Any]]) -> None:
        for name, result in zip(self._spec.outputs, results, strict=True):
            if not np.isfinite(result).all():
                raise InferenceError(f"the text encoder returned NaN or infinity in {name}. Try dtype='fp32'; if it is fp32, export the checkpoint again")


def _report_cut(cut: dict[str, str], *, strict: bool) -> None:
    """Report the ends of prompts that were cut off, each with the reason: by a warning in the log, or by InvalidArgumentError."""
    for end, reason in list(cut.items())[:MAX_WARNINGS]:
        if strict:
            raise InvalidArgumentError(f"{reason}, and this is beyond them: {printable(end)!r}. Shorten it, or leave strict_prompt=True out to cut it off.")
        log.warning("%s; its end was cut off: %r", reason, printable(end))
    if len(cut) > MAX_WARNINGS:
        log.warning("%d more prompts of this call were cut off", len(cut) - MAX_WARNINGS)
