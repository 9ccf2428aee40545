"""From the prompts of a call to the conditioning that the step graph reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.manifest import Manifest
from scm_runtime.bundle.text_spec import TextSpec
from scm_runtime.errors import InvalidArgumentError
from scm_runtime.inputs.arguments import CONDITIONING, CallArguments
from scm_runtime.inputs.prompts import check_prompt_lengths, read_prompts
from scm_runtime.text.encoder import OnLong, RunTextGraph, TextEncoder, TokenInputs

ARGUMENTS = ("prompt", "negative_prompt", "strict_prompt")

Arrays = dict[str, NDArray[Any]]
Encode = Callable[[TokenInputs], Sequence[NDArray[Any]]]


class PromptConditioning:
    """Encodes the prompts of calls of one bundle. A bundle without a text encoder refuses them."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Describe the bundle; nothing is opened."""
        self._manifest, self._spec = manifest, manifest.text
        self._encoder = None if manifest.text is None else TextEncoder(folder, manifest, manifest.text)

    def resolve(self, arguments: CallArguments, run: RunTextGraph | None) -> CallArguments:
        """Return the arguments of a call with ``conditioning`` in place of the prompts.

        Args:
            arguments: the call's arguments.
            run: runs the text graph. None only checks the arguments: the conditioning has the shapes of that of a prompt, and other values.

        Raises:
            InvalidArgumentError: the bundle takes no such prompt; a prompt is not valid; or what it provides is also given.
            MissingDependencyError, BundleSchemaError, InferenceError: see ``TextEncoder``.
        """
        prompt, negative, strict = (arguments.get(name) for name in ARGUMENTS)
        others = cast(CallArguments, {name: value for name, value in arguments.items() if name not in ARGUMENTS})
        conditioning = arguments.get("conditioning")
        if conditioning is not None and not isinstance(conditioning, Mapping):
            return others  # which is reported where all conditioning is read
        named = {name for name in CONDITIONING if arguments.get(name) is not None}
        given = named | {name for name, value in (conditioning or {}).items() if value is not None}
        if prompt is None and negative is None:
            self._check_has_prompt(given)
            return others
        spec, encoder = self._require("prompt" if prompt is not None else "negative_prompt")
        if negative is not None and not spec.negative_outputs:
            raise InvalidArgumentError(f"negative_prompt was given, but the bundle {self._manifest.name!r} uses none. Leave it out.")
        provided = (spec.outputs if prompt is not None else ()) + (spec.negative_outputs if negative is not None else ())
        if both := [name for name in provided if name in given]:
            raise InvalidArgumentError(f"{'negative_' * (both[0] in spec.negative_outputs)}prompt was given, and {both[0]} too. Give one of the two.")
        texts = {name: read_prompts(name, value) for name, value in (("prompt", prompt), ("negative_prompt", negative)) if value is not None}
        check_prompt_lengths(texts, arguments.get("seed"), arguments.get("batch_size"))
        needs_negative = prompt is not None and not given & set(spec.negative_outputs)
        encode = encoder.placeholders if run is None else lambda inputs: encoder.encode(inputs, run)
        on_long: OnLong = "raise" if _is_strict(strict) else "cut" if run is None else "warn"
        arrays = _encode(spec, encoder, texts, encode, on_long, needs_negative=needs_negative)
        return cast(CallArguments, {**others, "conditioning": {**(conditioning or {}), **arrays}})

    def encode(self, prompts: str | Sequence[str], negative_prompt: str | Sequence[str] | None, strict: object, run: RunTextGraph) -> Arrays:
        """Implement ``Generator.encode_prompt``."""
        listed = read_prompts("prompts", prompts)
        texts = [listed] if isinstance(listed, str) else listed
        resolved = self.resolve({"prompt": texts, "negative_prompt": negative_prompt, "strict_prompt": cast(bool, strict)}, run)
        spec, arrays = self._spec, cast(Arrays, resolved["conditioning"])
        assert spec is not None  # else resolve raises
        single = negative_prompt is None or isinstance(read_prompts("negative_prompt", negative_prompt), str)
        negatives = spec.negative_outputs if single else ()
        return arrays | {name: np.repeat(arrays[name][None], len(texts), 0) for name in negatives}

    def _check_has_prompt(self, given: set[str]) -> None:
        spec = self._spec
        if spec is not None and not given & {item.name for item in self._manifest.conditioning if item.kind == "embedding" and item.name in spec.outputs}:
            raise InvalidArgumentError(f"the bundle {self._manifest.name!r} needs a prompt: prompt='…', or its embeddings: {spec.outputs[0]}")

    def _require(self, argument: str) -> tuple[TextSpec, TextEncoder]:
        if self._spec is not None and self._encoder is not None:
            return self._spec, self._encoder
        names = [item.name for item in self._manifest.conditioning]
        if "prompt_embeds" not in names:
            raise InvalidArgumentError(f"{argument} was given, but the bundle {self._manifest.name!r} takes {', '.join(names) or 'no conditioning'}")
        raise InvalidArgumentError(
            f"{argument} was given, but the bundle {self._manifest.name!r} has no text encoder. Give prompt_embeds, or export the checkpoint again with its "
            "text encoder: scm-export … without --no-text"
        )


def _encode(spec: TextSpec, encoder: TextEncoder, texts: Mapping[str, str | list[str]], encode: Encode, on_long: OnLong, *, needs_negative: bool) -> Arrays:
    """Return the conditioning of the prompts, all encoded together: without a batch dimension for a single string, else ``[N, …]``.

    ``needs_negative``: a negative prompt that is not given is the empty one, or zeros, see the manifest.
    """
    listed = dict(texts)
    zeros = needs_negative and spec.zero_negative and "negative_prompt" not in texts
    if needs_negative and spec.negative_outputs and not zeros:
        listed.setdefault("negative_prompt", "")
    tokens = [encoder.tokenize([value] if isinstance(value, str) else value, name=name, on_long=on_long) for name, value in listed.items()]
    results = encode({name: np.concatenate([inputs[name] for inputs in tokens]) for name in tokens[0]})
    arrays: Arrays = {}
    at = 0
    for name, value in listed.items():
        rows = at if isinstance(value, str) else slice(at, at + len(value))
        at += 1 if isinstance(value, str) else len(value)
        arrays |= {output: result[rows] for output, result in zip(spec.outputs if name == "prompt" else spec.negative_outputs, results, strict=True)}
    if zeros:
        for negative, result in zip(spec.negative_outputs, results, strict=True):
            arrays[negative] = np.full_like(result[0], 0 if result.dtype == np.float32 else 1)  # a mask of zeros would leave no token
    return arrays


def _is_strict(strict: object) -> bool:
    if strict is None or isinstance(strict, bool):
        return bool(strict)
    raise InvalidArgumentError(f"strict_prompt must be True or False, got {strict!r}")
