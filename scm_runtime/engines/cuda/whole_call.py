"""All work of a call, from noise to decoded samples, as one CUDA graph.

    one upload:    seeds, conditioning, times, latents
    one launch:    noise of all draws, evaluations with their finite flags, decoder
    one download:  flags, and the last state or the decoder's output

Nothing can be read or changed between the evaluations: calls with callbacks, and requests that join a running batch, are evaluated in single steps
(``stepwise``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.manifest import Manifest
from scm_runtime.bundle.solver_tables import SolverStages
from scm_runtime.engines.cuda.blocks import ALIGNMENT, TensorBlock, TensorSpec
from scm_runtime.engines.cuda.capture import CaptureSwitch, EngineSessions, LiveGraphs, RepeatedWork
from scm_runtime.engines.cuda.handles import TimingEvent
from scm_runtime.engines.cuda.static_buffers import BatchShape
from scm_runtime.engines.cuda.stream import CudaStream
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.engines.engine import TimedPart
from scm_runtime.inputs.call import Call
from scm_runtime.ort.session import DeviceTensor

# Calls with more evaluations, or samples times evaluations, are not computed as a whole: what is enqueued cannot be cancelled, and graphs would be large.
MAX_EVALUATIONS = 4
MAX_SAMPLE_EVALUATIONS = 256
ALIGNED_NUMBERS = ALIGNMENT // 4  # in float32


class CallPlan(NamedTuple):
    """What a call computes, without the values of its inputs. Calls of equal plans and shapes share a CUDA graph."""

    combined: tuple[bool, ...]
    """For each evaluation, whether its result is combined with earlier states."""
    has_latents: bool
    """Whether latents replace the initial noise."""
    decodes: bool
    """Whether the last state is decoded."""


def plan_of(calls: Sequence[Call], *, decodes: bool) -> CallPlan | None:
    """Return the plan for calls in one batch, or None if they cannot be computed as a whole."""
    evaluations = calls[0].evaluations
    if len(evaluations) > MAX_EVALUATIONS or len(evaluations) * sum(len(call.seeds) for call in calls) > MAX_SAMPLE_EVALUATIONS:
        return None
    combined, has_latents = _combined(evaluations), calls[0].latents is not None
    for call in calls[1:]:
        if (call.latents is not None) != has_latents or len(call.evaluations) > MAX_EVALUATIONS or _combined(call.evaluations) != combined:
            return None
    return CallPlan(combined, has_latents, decodes)


@lru_cache(64)
def _combined(evaluations: SolverStages) -> tuple[bool, ...]:
    return tuple(one.weights is not None for one in evaluations)


class WholeResult(NamedTuple):
    """What was copied to the host."""

    finite: NDArray[np.bool_]
    """Whether each sample was finite after each evaluation, ``[evaluations, n]``."""
    state: NDArray[np.float32] | None
    """The last state, ``[n, *sample]``."""
    decoded: NDArray[Any] | None
    """The decoder's output, ``[n, ...]``."""


class WholeCall:
    """The buffers and the work of calls of one shape and plan.

    Attributes:
        may_capture: whether the work is to be captured.
        block: all tensors.
        state: the state after the last evaluation in device memory, ``[N, *sample]``.
        decoded: the decoder's output in device memory, or None if the plan has none.
    """

    def __init__(
        self,
        context: CudaContext,
        sessions: EngineSessions,
        manifest: Manifest,
        shape: BatchShape,
        dtypes: Mapping[str, type[np.generic]],
        plan: CallPlan,
        switch: CaptureSwitch,
        live: LiveGraphs,
        *,
        capture: bool,
    ) -> None:
        """Allocate the buffers. Raises OutOfMemoryError."""
        (n, sizes), count = shape, len(plan.combined)
        self.may_capture, self._stream, self._scale = capture, context.stream, np.float32(manifest.initial_scale)
        self._last_state = f"state {count}"
        row = -(-n // ALIGNED_NUMBERS) * ALIGNED_NUMBERS  # the flags of one evaluation, padded: 0 for a finite sample, otherwise NaN
        self._conditioning = [(name, f"conditioning {name}") for name, _ in sizes]
        state: TensorSpec = (np.float32, (n, *manifest.sample.shape))
        number: TensorSpec = (np.float32, (n,))
        constants: dict[str, TensorSpec] = {"initial scale": (np.float32, ()), "scale": (np.float32, ())}
        constants |= {f"draw {k}": (np.int64, ()) for k in range(count + 1)}
        inputs: dict[str, TensorSpec] = {"seeds": (np.int64, (n,)), **{f"conditioning {name}": (dtypes[name], (n, *size)) for name, size in sizes}}
        for k, combined in enumerate(plan.combined):
            inputs |= {f"t {k}": number, f"t_next {k}": number, **({f"weights {k}": (np.float32, (n, 3))} if combined else {})}
        first_state = {"state 0": state}
        states = {f"state {k}": state for k in range(1, count)} | ({"result": state} if any(plan.combined) else {})
        decoded: TensorSpec = (np.uint8 if manifest.output.kind == "image" else np.float32, (n, *manifest.output.shape))
        outputs: dict[str, TensorSpec] = {self._last_state: state, "finite": (np.float32, (count, row)), **({"decoded": decoded} if plan.decodes else {})}
        noise = {f"noise {k}": state for k in range(1, count + 1)}
        # In this order: the inputs are written by one copy, and the outputs read by one.
        self.block = TensorBlock(context, constants | inputs | first_state | states | noise | outputs)
        self.block.upload({"initial scale": self._scale, "scale": 1.0, **{f"draw {k}": k for k in range(count + 1)}})
        self._inputs = self.block.pinned([*inputs, *(first_state if plan.has_latents else {})])
        self._loaded: tuple[SolverStages, ...] = ()
        self._uploading = False
        # Recorded before the work, after the noise, after each evaluation, after decoding; and after a copy to the host.
        self._events = [context.stream.new_event() for _ in range(count + 3)]
        self._copied = context.stream.new_event()
        self._timed = _timed_parts(self._events, self._copied, decodes=plan.decodes)
        self.state, self._finite = self.block.tensor(self._last_state), self.block.tensor("finite")
        self.decoded = self.block.tensor("decoded") if plan.decodes else None
        self._row_nbytes = {one: _row_nbytes(one) for one in (self.state, self._finite, self.decoded) if one is not None}
        enqueue = partial(_enqueue, context.stream, self._bind(sessions, plan, prod(manifest.sample.shape)), self._events)  # without a reference to self
        failed = f"calls run without a CUDA graph for a batch of {n}"
        self._work = RepeatedWork(context.stream, enqueue, switch if capture else CaptureSwitch(False), live, failed)

    @property
    def waits(self) -> bool:
        """Whether the next call captures the work."""
        return self._work.waits

    @property
    def captured(self) -> bool:
        """Whether the work was captured as a CUDA graph."""
        return self._work.captured

    def release(self) -> None:
        """Free the CUDA graph. Waits for the work enqueued so far if that uses it, or the page-locked inputs."""
        if self.captured or self._uploading:
            self._stream.synchronize()
        self._work.release()

    def __call__(self, calls: Sequence[Call]) -> None:
        """Enqueue the work for calls in one batch; ``read`` waits for it. Raises what ``RepeatedWork`` raises."""
        if self._uploading:  # the call before has failed
            self._stream.synchronize()
        self._load(calls)
        self._uploading = True
        self._inputs.upload()
        self._work()

    def _load(self, calls: Sequence[Call]) -> None:
        """Write the inputs. The rows after the last sample repeat it."""
        arrays, evaluations, at = self._inputs.arrays, tuple(call.evaluations for call in calls), 0
        new_times = len(calls) > 1 or evaluations != self._loaded
        for call in calls:
            rows = slice(at, at := at + len(call.seeds))
            arrays["seeds"][rows] = call.seeds
            for name, field in self._conditioning:
                arrays[field][rows] = call.conditioning[name]
            if call.latents is not None:
                np.multiply(call.latents, self._scale, out=arrays["state 0"][rows])
            for k, one in enumerate(call.evaluations if new_times else ()):
                arrays[f"t {k}"][rows], arrays[f"t_next {k}"][rows] = one.t, one.t_next
                if one.weights is not None:
                    arrays[f"weights {k}"][rows] = one.weights
        self._loaded = evaluations if len(calls) == 1 else ()
        if at < len(arrays["seeds"]):
            for array in arrays.values():
                array[at:] = array[at - 1]

    def _bind(self, sessions: EngineSessions, plan: CallPlan, size: int) -> list[Sequence[Callable[[], None]]]:
        """Return the runs of the noise, of each evaluation and of the decoder."""
        tensor = self.block.tensor
        finite = tensor("finite")
        conditioning = {name: tensor(field) for name, field in self._conditioning}

        def draw(k: int, to: str) -> Callable[[], None]:
            scale = tensor("scale" if k else "initial scale")
            return sessions.noise.bind({"seeds": tensor("seeds"), "draw": tensor(f"draw {k}"), "scale": scale}, tensor(to))

        def evaluation(k: int, base: int, *, combined: bool) -> list[Callable[[], None]]:
            x, result = tensor(f"state {k}"), tensor(f"state {k + 1}")
            inputs = {"x": x, "t": tensor(f"t {k}"), "t_next": tensor(f"t_next {k}"), "noise": tensor(f"noise {k + 1}")}
            row = finite.shape[1] * np.dtype(np.float32).itemsize
            flags = DeviceTensor(finite.address + k * row, np.float32, result.shape[:1])
            check = sessions.finite.bind({"x": result._replace(shape=(result.shape[0], size))}, flags)
            if not combined:
                return [sessions.step.bind(inputs | conditioning, result), check]
            assert sessions.combine is not None
            summands = {"x": x, "base": tensor(f"state {base}"), "result": tensor("result"), "weights": tensor(f"weights {k}")}
            return [sessions.step.bind(inputs | conditioning, tensor("result")), sessions.combine.bind(summands, result), check]

        parts: list[Sequence[Callable[[], None]]] = [[draw(k, f"noise {k}" if k else "state 0") for k in range(plan.has_latents, len(plan.combined) + 1)]]
        base = 0
        for k, combined in enumerate(plan.combined):
            base = base if combined else k  # the state at the beginning of the step
            parts.append(evaluation(k, base, combined=combined))
        parts.append([sessions.decode.bind({"x": tensor(self._last_state)}, tensor("decoded"))] if plan.decodes else [])
        return parts

    def read(self, n: int, *, state: bool, decoded: bool) -> WholeResult:
        """Copy the flags of the first n samples to the host, with the last state or the decoder's output, in one copy. Waits until the work is done.

        Args:
            n: number of samples.
            state: whether to copy the state, if ``decoded`` is False.
            decoded: whether to copy the decoder's output.
        """
        first = self.state if state and not decoded else self._finite
        start = first.address
        last, rows = (self.decoded, n) if decoded and self.decoded else (self._finite, self._finite.shape[0])
        copied = self._stream.read(start, last.address - start + rows * self._row_nbytes[last], self._copied)
        self._uploading = False

        def tensor(source: DeviceTensor, rows: int) -> NDArray[Any]:
            at = source.address - start
            return copied[at : at + rows * self._row_nbytes[source]].view(source.dtype).reshape(rows, *source.shape[1:])

        finite: NDArray[np.bool_] = tensor(self._finite, self._finite.shape[0])[:, :n] == 0
        return WholeResult(finite, tensor(first, n).copy() if first is self.state else None, tensor(last, n).copy() if last is self.decoded else None)

    def parts(self, *, copies: bool) -> list[TimedPart]:
        """Return the timed parts of the latest call."""
        return self._timed if copies else self._timed[:-1]


def _enqueue(stream: CudaStream, parts: Sequence[Sequence[Callable[[], None]]], events: Sequence[TimingEvent], in_capture: bool) -> None:
    stream.record(events[0], in_capture=in_capture)
    for runs, event in zip(parts, events[1:], strict=True):
        for run in runs:
            run()
        stream.record(event, in_capture=in_capture)


def _timed_parts(events: Sequence[TimingEvent], copied: TimingEvent, *, decodes: bool) -> list[TimedPart]:
    start, drawn, *ends, decoded = events
    parts = [TimedPart("noise", start, drawn), *(TimedPart("step", *pair) for pair in pairwise((drawn, *ends)))]
    return [*parts, *([TimedPart("decode", ends[-1], decoded)] if decodes else []), TimedPart("copy", decoded, copied)]


def _row_nbytes(tensor: DeviceTensor) -> int:
    return np.dtype(tensor.dtype).itemsize * prod(tensor.shape[1:])
