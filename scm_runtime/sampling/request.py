"""A call on its way: what was asked for, checked, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from scm_runtime.engines.engine import Trajectory
from scm_runtime.errors import InvalidArgumentError
from scm_runtime.inputs.arguments import OUTPUT_TYPES, CallArguments, Callback, OnStep, OutputType, check_names, conditioning_of
from scm_runtime.inputs.call import Call, Labels, resolve_call
from scm_runtime.tracing import Span

if TYPE_CHECKING:
    from scm_runtime.generator import Generator


@dataclass(eq=False)
class Request:
    """One call: what was asked, and how far it is."""

    trajectory: Trajectory
    output_type: OutputType
    on_step: OnStep | None
    """Called after each step with its index, the time it began at and the state; see Generator."""
    start: float
    """When it came, by ``time.perf_counter``."""
    start_ns: int
    """The same, in nanoseconds since the epoch."""
    begun_ns: int = 0
    """When work on it began, after it may have waited for its turn."""
    spans: list[Span] = field(default_factory=list)
    """Of its parts, where somebody wants to be told."""

    @staticmethod
    def of(resolve: Callable[[], Call], output_type: OutputType, on_step: OnStep | None) -> Request:
        """A request that comes now; ``resolve`` checks its arguments."""
        start, start_ns = time.perf_counter(), time.time_ns()
        return Request(Trajectory(resolve()), output_type, on_step, start, start_ns)


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
