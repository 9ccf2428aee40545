"""Names and types of the arguments that a Generator's call, ``submit``, ``async_`` and ``stream`` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scm_runtime.bundle.manifest import LABELS, Manifest
from scm_runtime.errors import InvalidArgumentError
from scm_runtime.inputs.prompts import Prompts

if TYPE_CHECKING:
    from scm_runtime.generator import Generator

Labels = int | str | Sequence[int | str] | NDArray[np.integer[Any]]
Seeds = int | Sequence[int] | NDArray[np.integer[Any]]
OutputType = Literal["pil", "np", "latent", "dlpack"]
OUTPUT_TYPES = ("pil", "np", "latent", "dlpack")
OnStep = Callable[[int, float, NDArray[np.float32]], Mapping[str, Any] | Literal[False] | None]
Callback = Callable[["Generator", int, float, dict[str, NDArray[np.float32]]], Mapping[str, Any] | Literal[False] | None]


class BatchArguments(TypedDict, total=False):
    """Arguments that do not depend on the number of samples. ``Generator.__call__`` documents them."""

    num_inference_steps: int | None
    timesteps: Sequence[float] | None
    sampler: str | None
    guidance_scale: float | Sequence[float] | None
    prompt: Prompts | None
    negative_prompt: Prompts | None
    strict_prompt: bool
    prompt_embeds: ArrayLike | None
    prompt_attention_mask: ArrayLike | None
    pooled_prompt_embeds: ArrayLike | None
    negative_prompt_embeds: ArrayLike | None
    negative_prompt_attention_mask: ArrayLike | None
    negative_pooled_prompt_embeds: ArrayLike | None
    conditioning: Mapping[str, ArrayLike] | None
    latents: ArrayLike | None
    output_type: OutputType
    callback_on_step_end: Callback | None
    timeout: float | None


class CallArguments(BatchArguments, total=False):
    """Keyword arguments of a call, except class_labels, which may also be positional."""

    seed: Seeds | None
    batch_size: int | None


ENCODED = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
EMBEDDINGS = (*ENCODED, *(f"negative_{name}" for name in ENCODED))
"""What ``encode_prompt`` may return."""
CONDITIONING = ("guidance_scale", *EMBEDDINGS)  # inputs with an argument each, besides class_labels
DEFAULTS: Mapping[str, object] = {"output_type": OUTPUT_TYPES[0], "strict_prompt": False}
"""Defaults of arguments that are not None."""


_NAMES = {kind: frozenset(name for base in (BatchArguments, kind) for name in base.__annotations__) for kind in (BatchArguments, CallArguments)}


def check_names(arguments: Mapping[str, object], kind: type[BatchArguments]) -> None:
    """Raise TypeError for an unknown argument, as Python does."""
    known = _NAMES[kind]
    if not arguments.keys() <= known:
        unknown = min(arguments.keys() - known)
        raise TypeError(f"got an unexpected keyword argument {unknown!r}: known are class_labels, {', '.join(sorted(known))}")


def gather_conditioning(manifest: Manifest, class_labels: Labels | None, arguments: BatchArguments) -> dict[str, Any]:
    """Return the conditioning that a call gives, by the names of the step graph's inputs.

    ``class_labels`` is for the input ``manifest.labels``, whatever its name.

    Raises:
        InvalidArgumentError: ``conditioning`` is not a mapping, or has an input that was also given by its argument.
    """
    named: dict[str, Any] = {}
    for name in CONDITIONING:
        if (value := arguments.get(name)) is not None:
            named[name] = value
    if class_labels is not None:
        labels = manifest.labels
        named[LABELS if labels is None else labels.name] = class_labels
    others = arguments.get("conditioning")
    if others is None:
        return named
    if not isinstance(others, Mapping):
        raise InvalidArgumentError(f"conditioning must be a dict of the model's inputs by name, got {type(others).__name__}")
    for name, value in others.items():
        if name in named:
            raise InvalidArgumentError(f"{name} was given both as an argument and in conditioning. Give it once.")
        if value is not None:
            named[name] = value
    return named
