"""Names and types of the arguments that a Generator's call, ``submit``, ``async_`` and ``stream`` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scm_runtime.inputs.call import Labels, Seeds, gather_conditioning

if TYPE_CHECKING:
    from scm_runtime.generator import Generator

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
    prompt_embeds: ArrayLike | None
    prompt_attention_mask: ArrayLike | None
    conditioning: Mapping[str, ArrayLike] | None
    latents: ArrayLike | None
    output_type: OutputType
    callback_on_step_end: Callback | None


class CallArguments(BatchArguments, total=False):
    """Keyword arguments of a call, except class_labels, which may also be positional."""

    seed: Seeds | None
    batch_size: int | None


CONDITIONING = ("guidance_scale", "prompt_embeds", "prompt_attention_mask")  # inputs with an argument each, besides class_labels


def check_names(arguments: Mapping[str, object], kind: type[BatchArguments]) -> None:
    """Raise TypeError for an unknown argument, as Python does."""
    known = {name for base in (BatchArguments, kind) for name in base.__annotations__}
    if unknown := sorted(arguments.keys() - known):
        raise TypeError(f"got an unexpected keyword argument {unknown[0]!r}: known are class_labels, {', '.join(sorted(known))}")


def conditioning_of(class_labels: Labels | None, arguments: BatchArguments) -> dict[str, Any]:
    """Return the given conditioning by the names of the step graph's inputs; raises InvalidArgumentError."""
    return gather_conditioning(arguments.get("conditioning"), class_labels=class_labels, **{name: arguments.get(name) for name in CONDITIONING})
