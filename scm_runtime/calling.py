"""The arguments that a call, ``submit``, ``async_`` and ``stream`` share, and the request they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scm_runtime.arguments import Labels, Seeds, gather_conditioning, resolve_call
from scm_runtime.errors import InvalidArgumentError
from scm_runtime.sampling import OUTPUT_TYPES, OnStep, OutputType, Request

if TYPE_CHECKING:
    from scm_runtime.generator import Generator

Callback = Callable[["Generator", int, float, dict[str, NDArray[np.float32]]], Mapping[str, Any] | Literal[False] | None]


class BatchArguments(TypedDict, total=False):
    """What holds for any number of samples; ``Generator.__call__`` says what each means."""

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
    """All of a call's but the labels, which may stand first without their name."""

    seed: Seeds | None
    batch_size: int | None


CONDITIONING = ("guidance_scale", "prompt_embeds", "prompt_attention_mask")  # those with arguments of their own, beside class_labels


def check_names(arguments: Mapping[str, object], kind: type[BatchArguments]) -> None:
    """Raise TypeError, as Python does, for an argument that there is not."""
    known = {name for base in (BatchArguments, kind) for name in base.__annotations__}
    if unknown := sorted(arguments.keys() - known):
        raise TypeError(f"got an unexpected keyword argument {unknown[0]!r}: there are class_labels, {', '.join(sorted(known))}")


def conditioning_of(class_labels: Labels | None, arguments: BatchArguments) -> dict[str, Any]:
    """All conditioning given, by the names of the graph's inputs; raises InvalidArgumentError."""
    return gather_conditioning(arguments.get("conditioning"), class_labels=class_labels, **{name: arguments.get(name) for name in CONDITIONING})


def read_request(generator: Generator, class_labels: Labels | None, arguments: CallArguments) -> Request:
    """The request for these arguments, checked; raises InvalidArgumentError, and TypeError for an argument that there is not."""
    check_names(arguments, CallArguments)
    output_type = arguments.get("output_type", "pil")
    if output_type not in OUTPUT_TYPES:
        raise InvalidArgumentError(f"output_type must be {', '.join(map(repr, OUTPUT_TYPES[:-1]))} or {OUTPUT_TYPES[-1]!r}, got {output_type!r}")
    callback = arguments.get("callback_on_step_end")
    if callback is not None and not callable(callback):
        raise InvalidArgumentError(f"callback_on_step_end must be a function, or None, got {callback!r}")
    conditioning = conditioning_of(class_labels, arguments)

    def resolve() -> Any:
        return resolve_call(
            generator.manifest,
            conditioning=conditioning,
            seed=arguments.get("seed"),
            batch_size=arguments.get("batch_size"),
            latents=arguments.get("latents"),
            evaluations=generator._schedules.evaluations(arguments.get("sampler"), arguments.get("num_inference_steps"), arguments.get("timesteps")),
        )

    return Request.of(resolve, output_type, _on_step(generator, callback))


def _on_step(generator: Generator, callback: Callback | None) -> OnStep | None:
    if callback is None:
        return None

    def on_step(step: int, t: float, x: NDArray[np.float32]) -> Mapping[str, Any] | Literal[False] | None:
        return callback(generator, step, t, {"latents": x})

    return on_step
