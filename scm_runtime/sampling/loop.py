"""The sampling loop over an engine, in pieces that one call and merged calls share.

    x = noise(seeds, draw=0) * initial_scale
    for k, (t, t_next) in enumerate(pairs(times)):
        x = step(x, t, t_next, noise(seeds, draw=k + 1), conditioning)
    image = decode(x)

With a diffusion model's other samplers a step may take several evaluations: see ``bundle.solver_tables``. It knows nothing of any model's
mathematics: noise, step and decode are graphs of the bundle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.manifest import Manifest
from scm_runtime.common.runs import RunRegistry
from scm_runtime.engines.engine import Engine
from scm_runtime.errors import GenerationCancelledError, InvalidArgumentError
from scm_runtime.samples import PICTURE_CHANNELS, Samples, Timings
from scm_runtime.sampling.nonfinite import Guard
from scm_runtime.sampling.request import Request
from scm_runtime.tracing import OnSpan, Span

Result = TypeVar("Result")


class Sampler:
    """Brings requests from noise to samples on one engine."""

    def __init__(self, engine: Engine, guard: Guard, runs: RunRegistry, manifest: Manifest, attributes: Mapping[str, str], on_span: OnSpan | None) -> None:
        """``runs`` are those of the engine and the guard; ``attributes`` those of every span of a call."""
        self.engine, self.guard, self._runs = engine, guard, runs
        self._manifest, self._attributes, self._on_span = manifest, attributes, on_span

    def sample(self, request: Request) -> Samples:
        """A request alone, from beginning to end, called from any thread; raises what ``Generator.__call__`` raises.

        GeneratorClosedError comes out of ``begin``, ``advance`` and ``finish``, if ``runs`` are terminated before or meanwhile.
        """
        if request.on_step is not None:  # which runs in the caller's thread
            return self.deliver(request, self._sample(request, self.engine.run))
        return self.deliver(request, self.engine.run(lambda: self._sample(request, directly)))

    def _sample(self, request: Request, run: Callable[[Callable[[], Any]], Any]) -> Samples:
        run(lambda: self.begin(request))
        while not request.trajectory.done:
            run(lambda: self.advance([request]))
            self.after_step(request, run)
        samples: Samples = run(lambda: self.finish([request])[0])
        return samples

    def begin(self, request: Request) -> None:
        """Its first state; within a job of the engine."""
        self._runs.check()
        request.begun_ns = time.time_ns()
        self.engine.begin(request.trajectory)

    def advance(self, requests: Sequence[Request]) -> None:
        """One evaluation for all of them; within a job of the engine."""
        self._runs.check()
        self.engine.advance([request.trajectory for request in requests])
        for request in requests:
            request.trajectory.k += 1

    def after_step(self, request: Request, run: Callable[[Callable[[], Any]], Any]) -> None:
        """Check what the step made, where looking costs little, and tell the callback. ``run`` runs a job of the engine.

        Raises:
            NonFiniteError: see Guard.
            GenerationCancelledError: the callback returned False.
            InvalidArgumentError: it returned what makes no state.
        """
        trajectory = request.trajectory
        call, k = trajectory.call, trajectory.k - 1
        if request.on_step is None or not call.ends_a_step(k):
            if not self.engine.lazy:
                self.guard.check(trajectory)
            return

        def look() -> NDArray[np.float32]:
            self.guard.check(trajectory)
            return np.array(self.engine.fetch(trajectory))  # the callback's own, on every device

        x: NDArray[np.float32] = run(look)
        step, t = call.step_of(k)
        changed = _returned(request.on_step(step, t, x), x, step + 1)
        if changed is not None:
            trajectory.origin = (trajectory.k, changed)
            run(lambda: self.engine.replace(trajectory, changed))

    def finish(self, requests: Sequence[Request]) -> list[Samples]:
        """Decode those that are done, all in one evaluation, and return their samples; within a job of the engine. Raises NonFiniteError.

        Requests are decoded together only if they want pixels on the host.
        """
        self._runs.check()
        for request in requests:
            self.guard.check(request.trajectory)
        pixels_of = ("pil", "np") if self.engine.lazy else ("pil", "np", "dlpack")
        on_host = [request for request in requests if request.output_type in pixels_of]
        arrays: dict[Request, Any] = {}
        if on_host:
            decoded = self.engine.decode([request.trajectory for request in on_host])
            for request, pixels in zip(on_host, decoded, strict=True):
                arrays[request] = self.guard.check_pixels(request.trajectory, pixels)
        for request in requests:
            if request.output_type == "latent":
                arrays[request] = np.array(self.engine.fetch(request.trajectory))
            elif request not in arrays:
                arrays[request] = self.engine.on_device(request.trajectory)
        return [self._samples(request, arrays[request]) for request in requests]

    def _samples(self, request: Request, array: Any) -> Samples:
        parts = request.trajectory.parts
        if self._on_span is not None:
            request.spans = self._spans(request)
        spent: dict[str, list[float]] = {"noise": [], "step": [], "decode": [], "copy": []}
        for part in parts:
            spent[part.name].append(self.engine.seconds(part.start, part.end))
        return Samples(
            array=array,
            seeds=tuple(request.trajectory.call.seeds.tolist()),
            conditioning=request.trajectory.call.conditioning,
            timings=Timings(
                noise=sum(spent["noise"]),
                steps=tuple(spent["step"]),
                decode=sum(spent["decode"]),
                copy=sum(spent["copy"]),
                total=time.perf_counter() - request.start,
                waited=max(request.begun_ns - request.start_ns, 0) / 1e9,
            ),
            has_decoder=self._manifest.output.kind == "image",
        )

    def deliver(self, request: Request, samples: Samples) -> Samples:
        """The last touch, in the thread that receives them: spans are told, pictures made."""
        self.tell(request, samples)
        if request.output_type == "pil" and samples.has_decoder and samples.array.shape[-1] in PICTURE_CHANNELS:
            samples.images  # noqa: B018 - made now, so that the caller's first look is free
        return samples

    def tell(self, request: Request, samples: Samples) -> None:
        """Its spans."""
        if (on_span := self._on_span) is None:
            return
        for span in request.spans:
            on_span(span)
        whole: dict[str, str | int | float] = {**self._attributes, "batch_size": len(samples), "num_inference_steps": request.trajectory.call.steps}
        on_span(Span("generate", request.start_ns, request.start_ns + round(samples.timings.total * 1e9), whole))

    def _spans(self, request: Request) -> list[Span]:
        spans, steps = [], 0
        zero = request.trajectory.parts[0].start
        for part in request.trajectory.parts:
            attributes: dict[str, str | int | float] = {}
            if part.name == "step":
                attributes, steps = {"step": steps}, steps + 1
            start, end = (request.begun_ns + round(self.engine.seconds(zero, mark) * 1e9) for mark in (part.start, part.end))
            spans.append(Span(part.name, start, end, attributes))
        return spans

    def close(self) -> None:
        """Give back what the engines hold."""
        self.guard.close()
        self.engine.close()


def directly(job: Callable[[], Result]) -> Result:
    """Run a job within one of the engine's."""
    return job()


def _returned(returned: object, x: NDArray[np.float32], step: int) -> NDArray[np.float32] | None:
    """The state that a callback wants in place of ``x``, or None."""
    if returned is None:
        return None
    if returned is False:
        raise GenerationCancelledError(f"callback_on_step_end returned False after step {step}: the call ended there")
    if not isinstance(returned, Mapping):
        raise InvalidArgumentError(f"callback_on_step_end must return None, False to stop, or a dict with 'latents', got {type(returned).__name__}")
    if unknown := sorted(map(str, returned.keys() - {"latents"})):
        raise InvalidArgumentError(f"callback_on_step_end may return 'latents', got {', '.join(map(repr, unknown))}")
    if "latents" not in returned:
        return None
    replaced = returned["latents"]
    try:
        if np.iscomplexobj(replaced):
            raise TypeError("complex numbers")
        changed = np.array(replaced, np.float32, order="C")
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"callback_on_step_end must return latents that are an array of numbers, got {type(replaced).__name__}") from error
    if changed.shape != x.shape:
        raise InvalidArgumentError(f"callback_on_step_end must return latents of the shape {list(x.shape)}, got {list(changed.shape)}")
    if not np.isfinite(changed).all():
        raise InvalidArgumentError("callback_on_step_end must return finite latents, got NaN or infinity")
    return changed
