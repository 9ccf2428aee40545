"""Requests: the checked arguments of one call, and how far its computation is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.manifest import Manifest
from scm_runtime.bundle.solver_tables import SolverTables
from scm_runtime.engines.engine import Trajectory
from scm_runtime.errors import InvalidArgumentError
from scm_runtime.inputs.arguments import OUTPUT_TYPES, CallArguments, Labels, OnStep, OutputType, check_names, gather_conditioning
from scm_runtime.inputs.call import resolve_call
from scm_runtime.samples import Span
from scm_runtime.sampling.deadline import Deadline, read_deadline


@dataclass(eq=False)
class Request:
    """A call with its arguments checked."""

    trajectory: Trajectory
    output_type: OutputType
    on_step: OnStep | None
    """Callback after each step, with the step's index, the time at its start, and the state."""
    start: float
    """``time.perf_counter`` when the call was made, in seconds."""
    start_ns: int
    """The same moment in nanoseconds since the epoch."""
    deadline: Deadline | None = None
    """When it must be finished; None for no limit."""
    text: float = 0.0
    """Seconds in which its prompts were encoded."""
    started_ns: int = 0
    """When its computation started, in nanoseconds since the epoch: later than ``start_ns`` if it waited in the queue."""
    spans: list[Span] = field(default_factory=list)
    """Spans of its parts, if ``on_span`` is set."""


EncodePrompts = Callable[[CallArguments, Deadline | None], CallArguments]
"""Returns the arguments of a call with conditioning in place of the prompts."""


def read_request(
    manifest: Manifest,
    solver_tables: SolverTables,
    class_labels: Labels | None,
    arguments: CallArguments,
    encode_prompts: EncodePrompts | None = None,
    *,
    callback_owner: object = None,
) -> Request:
    """Check the arguments of a call against a bundle.

    Args:
        manifest: the bundle's manifest.
        solver_tables: the bundle's samplers.
        class_labels: the call's labels.
        arguments: the call's other arguments.
        encode_prompts: encodes its prompts, after the arguments that can be checked before. None for calls without prompts.
        callback_owner: first argument of ``callback_on_step_end``: the Generator.

    Raises:
        InvalidArgumentError: an argument is out of range or of the wrong shape.
        TypeError: there is no argument of that name.
    """
    start, start_ns, deadline = time.perf_counter(), time.time_ns(), read_deadline(arguments.get("timeout"))
    check_names(arguments, CallArguments)
    output_type = arguments.get("output_type", "pil")
    if output_type not in OUTPUT_TYPES:
        raise InvalidArgumentError(f"output_type must be {', '.join(map(repr, OUTPUT_TYPES[:-1]))} or {OUTPUT_TYPES[-1]!r}, got {output_type!r}")
    on_step = _on_step(arguments.get("callback_on_step_end"), callback_owner)
    evaluations = solver_tables.evaluations(arguments.get("sampler"), arguments.get("num_inference_steps"), arguments.get("timesteps"))
    encoding = time.perf_counter()
    if encode_prompts is not None:
        arguments = encode_prompts(arguments, deadline)
    encoded = time.perf_counter()
    call = resolve_call(
        manifest,
        conditioning=gather_conditioning(manifest, class_labels, arguments),
        seed=arguments.get("seed"),
        batch_size=arguments.get("batch_size"),
        latents=arguments.get("latents"),
        evaluations=evaluations,
    )
    return Request(Trajectory(call), output_type, on_step, start, start_ns, deadline, encoded - encoding)


def _on_step(callback: Any, owner: object) -> OnStep | None:
    if callback is None:
        return None
    if not callable(callback):
        raise InvalidArgumentError(f"callback_on_step_end must be a function, or None, got {callback!r}")

    def on_step(step: int, t: float, x: NDArray[np.float32]) -> Mapping[str, Any] | Literal[False] | None:
        result: Mapping[str, Any] | Literal[False] | None = callback(owner, step, t, {"latents": x})
        return result

    return on_step
