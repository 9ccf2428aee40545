"""The sampling loop over an engine, in parts that a single call and batched requests share.

    x = noise(seeds, draw=0) * initial_scale
    for k, (t, t_next) in enumerate(pairs(times)):
        x = step(x, t, t_next, noise(seeds, draw=k + 1), conditioning)
    image = decode(x)

With the other samplers of a diffusion model, a step can take several evaluations: see ``bundle.solver_tables``. The loop contains no mathematics of any
model: noise, step and decode are graphs of the bundle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.manifest import Manifest
from scm_runtime.common.memory import memory_errors
from scm_runtime.common.runs import CancelScope, RunRegistry
from scm_runtime.engines.engine import Engine, Output, PartName
from scm_runtime.inputs.arguments import OutputType
from scm_runtime.samples import IMAGE_CHANNELS, OnSpan, Samples, Span, Timings
from scm_runtime.sampling.callback import returned_state
from scm_runtime.sampling.deadline import cancelled_at
from scm_runtime.sampling.durations import CallDurations
from scm_runtime.sampling.nonfinite import NonFiniteHandler
from scm_runtime.sampling.request import Request
from scm_runtime.sampling.spans import spans_of

Result = TypeVar("Result")

_OUTPUTS: dict[OutputType, Output] = {"pil": "pixels", "np": "pixels", "latent": "state", "dlpack": "device"}


class SamplingLoop:
    """Computes the samples of requests on one engine."""

    def __init__(
        self,
        engine: Engine,
        nonfinite: NonFiniteHandler,
        runs: RunRegistry,
        manifest: Manifest,
        attributes: Mapping[str, str],
        on_span: OnSpan | None,
    ) -> None:
        """Make a loop.

        Args:
            engine: computes the steps.
            nonfinite: handles NaN and infinity.
            runs: registry of the runs of both.
            manifest: the bundle's manifest.
            attributes: attributes of the span of every call.
            on_span: receives the spans, if it is not None.
        """
        self.engine, self.nonfinite, self._runs = engine, nonfinite, runs
        self._attributes, self._on_span = attributes, on_span
        self._has_decoder = manifest.output.kind == "image"
        self._durations = CallDurations()

    def sample(self, request: Request) -> Samples:
        """Compute a request from noise to samples, on any thread. Raises what ``Generator.__call__`` raises.

        ``start``, ``step`` and ``decode_finished`` raise the error of the termination if the runs are terminated before or during the call.
        """
        scope = CancelScope()

        def run(job: Callable[[], Any]) -> Any:
            return scope.call(partial(self.engine.run, job))

        with nullcontext() if request.deadline is None else cancelled_at(request.deadline, scope):
            if request.on_step is not None:
                samples = self._sample_in_parts(request, run)
            else:
                job = partial(self._sample, request)
                samples = scope.call(partial(self.engine.run, job, brief=self._durations.is_brief(request)))
        return self.finalize(request, samples)

    def _sample(self, request: Request) -> Samples:
        """Compute a request without a callback, in a job of the engine."""
        if self.engine.asynchronous:
            return self.decode_finished([request])[0] if self.evaluate_all([request]) else self._sample_in_parts(request, run_inline)
        with _memory_errors([request]):
            samples = self.engine.in_one_run(partial(self._sample_in_one_run, request))
        parts = request.trajectory.parts
        self._durations.note(request, self.engine.elapsed(parts[0].start, parts[-1].end))
        return samples

    def _sample_in_one_run(self, request: Request) -> Samples:
        """Compute a request without a callback, in one run: each evaluation ends if the run is terminated, so nothing is checked between them."""
        request.started_ns = time.time_ns()
        self.engine.start(request.trajectory)
        for _ in request.trajectory.call.evaluations:
            self.engine.step((request.trajectory,))
            request.trajectory.evaluations_done += 1
            self.nonfinite.check(request.trajectory)  # may compute all steps again
        return self._decode([request])[0]

    def _sample_in_parts(self, request: Request, run: Callable[[Callable[[], Any]], Any]) -> Samples:
        """Compute a request in one job for each part. A callback runs between them, on the caller's thread and outside of the scope."""
        run(lambda: self.start(request))
        while not request.trajectory.done:
            run(lambda: self.step([request]))
            self.after_step(request, run)
        samples: Samples = run(lambda: self.decode_finished([request])[0])
        return samples

    def evaluate_all(self, requests: Sequence[Request]) -> bool:
        """Compute all evaluations of requests that have no callback and were not started. Call it in a job of the engine.

        Returns:
            False if the engine evaluates these requests step by step: nothing was done then.
        """
        self._runs.check()
        started_ns = time.time_ns()
        with _memory_errors(requests):
            if not self.engine.sample([request.trajectory for request in requests], [_OUTPUTS[request.output_type] for request in requests]):
                return False
        self._runs.check()  # what is on the device cannot be ended early
        for request in requests:
            request.started_ns = started_ns
            request.trajectory.evaluations_done = len(request.trajectory.call.evaluations)
        return True

    def start(self, request: Request) -> None:
        """Set the first state of a request. Call it in a job of the engine."""
        self._runs.check()
        request.started_ns = time.time_ns()
        with _memory_errors([request]):
            self.engine.start(request.trajectory)

    def step(self, requests: Sequence[Request]) -> None:
        """Evaluate the step graph once for all requests. Call it in a job of the engine."""
        self._runs.check()
        with _memory_errors(requests):
            self.engine.step([request.trajectory for request in requests])
        for request in requests:
            request.trajectory.evaluations_done += 1

    def after_step(self, request: Request, run: Callable[[Callable[[], Any]], Any]) -> None:
        """Check the result of a step if reading it is cheap or a callback needs it, and call the callback.

        Args:
            request: the request after the step.
            run: runs a job on the engine.

        Raises:
            NonFiniteError: see NonFiniteHandler.
            GenerationCancelledError: the callback returned False.
            InvalidArgumentError: the callback returned something that is not a state.
        """
        trajectory = request.trajectory
        call, k = trajectory.call, trajectory.evaluations_done - 1

        def check() -> None:
            with _memory_errors([request]):
                self.nonfinite.check(trajectory)  # may compute all steps again

        if request.on_step is None or not call.ends_a_step(k):
            if not self.engine.asynchronous:
                run(check)
            return

        def read() -> NDArray[np.float32]:
            check()
            with _memory_errors([request]):
                return np.array(self.engine.read_state(trajectory))  # a copy that the callback may change, on every device

        x: NDArray[np.float32] = run(read)
        step, t = call.step_of(k)
        returned = request.on_step(step, t, x)
        with _memory_errors([request]):
            changed = returned_state(returned, x, step + 1)
            if changed is not None:
                trajectory.restart_point = (trajectory.evaluations_done, changed)
                run(lambda: self.engine.set_state(trajectory, changed))

    def decode_finished(self, requests: Sequence[Request]) -> list[Samples]:
        """Decode requests whose steps are done, those that want pixels on the host in one batch. Call it in a job of the engine. Raises NonFiniteError."""
        self._runs.check()
        with _memory_errors(requests):
            return self._decode(requests)

    def _decode(self, requests: Sequence[Request]) -> list[Samples]:
        for request in requests:
            self.nonfinite.check(request.trajectory)
        decoded_on_host = ("pil", "np") if self.engine.asynchronous else ("pil", "np", "dlpack")
        on_host = [request for request in requests if request.output_type in decoded_on_host]
        arrays: dict[Request, Any] = {}
        if on_host:
            decoded = self.engine.decode([request.trajectory for request in on_host])
            for request, pixels in zip(on_host, decoded, strict=True):
                arrays[request] = self.nonfinite.check_pixels(request.trajectory, pixels)
        for request in requests:
            if request.output_type == "latent":
                arrays[request] = np.array(self.engine.read_state(request.trajectory))
            elif request not in arrays:
                arrays[request] = self.engine.decode_on_device(request.trajectory)
        return [self._samples(request, arrays[request]) for request in requests]

    def _samples(self, request: Request, array: Any) -> Samples:
        if self._on_span is not None:
            request.spans = spans_of(request, self.engine.elapsed)
        call = request.trajectory.call
        seconds: dict[PartName, float] = {"noise": 0.0, "decode": 0.0, "copy": 0.0}
        steps: list[float] = []
        elapsed = self.engine.elapsed
        for name, start, end in request.trajectory.parts:
            if name == "step":
                steps.append(elapsed(start, end))
            else:
                seconds[name] += elapsed(start, end)
        return Samples(
            array=array,
            seeds=tuple(call.seeds.tolist()),
            conditioning=call.conditioning,
            timings=Timings(
                noise=seconds["noise"],
                steps=tuple(steps),
                decode=seconds["decode"],
                copy=seconds["copy"],
                total=time.perf_counter() - request.start,
                waited=max((request.started_ns - request.start_ns) / 1e9 - request.text, 0.0),
                text=request.text,
            ),
            has_decoder=self._has_decoder,
        )

    def finalize(self, request: Request, samples: Samples) -> Samples:
        """Emit the spans and make the PIL images, on the thread that receives the samples."""
        self.emit_spans(request, samples)
        if request.output_type == "pil" and samples.has_decoder and samples.array.shape[-1] in IMAGE_CHANNELS:
            samples.images  # noqa: B018 - a cached property: computed now, so that the first access is fast
        return samples

    def emit_spans(self, request: Request, samples: Samples) -> None:
        """Pass the spans of a request to ``on_span``."""
        if (on_span := self._on_span) is None:
            return
        for span in request.spans:
            on_span(span)
        attributes: dict[str, str | int | float] = {
            **self._attributes,
            "batch_size": len(samples),
            "num_inference_steps": request.trajectory.call.steps,
        }
        on_span(Span("generate", request.start_ns, request.start_ns + round(samples.timings.total * 1e9), attributes))

    def close(self) -> None:
        """Free what the engines hold."""
        self.nonfinite.close()
        self.engine.close()


def run_inline(job: Callable[[], Result]) -> Result:
    """Run a job inside a job of the engine that runs already."""
    return job()


def _memory_errors(requests: Sequence[Request]) -> AbstractContextManager[None]:
    """Turn errors of exhausted memory in a block into OutOfMemoryError with the size of the batch."""
    return memory_errors(lambda: f"a batch of {sum(len(request.trajectory) for request in requests)}")
