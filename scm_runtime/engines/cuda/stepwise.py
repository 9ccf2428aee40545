"""Single evaluations of trajectories whose states are in device memory: merged at different steps, read and changed between two evaluations.

A call's seeds and conditioning are uploaded once. A step copies the states of its trajectories side by side into static buffers (``static_buffers``), runs
the noise graph and the step graph there, and copies the results back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.manifest import Manifest
from scm_runtime.engines.cuda.device_state import DeviceState
from scm_runtime.engines.cuda.handles import TimingEvent
from scm_runtime.engines.cuda.static_buffers import StaticBuffers
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.engines.engine import IDENTITY_WEIGHTS, TimedPart, Trajectory, combines, weights_of
from scm_runtime.ort.session import DeviceTensor

FLAG_BYTES = 4  # float32
MAX_QUEUED_STEPS = 2  # one runs and the next is ready; a call that is cancelled cannot take back what is queued


class Stepwise:
    """Evaluates trajectories whose state is a ``DeviceState``."""

    def __init__(self, context: CudaContext, manifest: Manifest) -> None:
        """Work on a context's stream. The buffers that the methods take may be for more rows than the trajectories have."""
        self._context, self._manifest = context, manifest
        self._queued: deque[TimingEvent] = deque()  # at the ends of the latest steps

    def start(self, trajectory: Trajectory, buffers: StaticBuffers) -> None:
        """Upload the call's seeds and conditioning, and compute the initial state from its latents or from noise of draw 0."""
        stream, call, scale = self._context.stream, trajectory.call, self._manifest.initial_scale
        start = stream.record()
        state = DeviceState(self._context, trajectory, self._manifest.sample.shape)
        if call.latents is None:
            _load(self._context, buffers, [trajectory], [state])
            buffers.block.upload({"draw": 0, "scale": scale})
            buffers.noise()
            stream.copy(state.block.address("x"), buffers.block.address("noise"), state.block.nbytes["x"])
        else:
            state.block.upload({"x": call.latents * np.float32(scale)})
        trajectory.state = state
        trajectory.parts.append(TimedPart("noise", start, stream.record()))

    def step(self, trajectories: Sequence[Trajectory], buffers: StaticBuffers) -> None:
        """Enqueue the next evaluation of each trajectory, all in one batch. Waits while MAX_QUEUED_STEPS earlier ones are not finished."""
        stream = self._context.stream
        if len(self._queued) == MAX_QUEUED_STEPS:
            stream.wait_for(self._queued.popleft())
        start, states = stream.record(), [one.state for one in trajectories]
        block, size = buffers.block, buffers.size
        _load(self._context, buffers, trajectories, states)
        block.upload({"t": _times(trajectories, 0, size), "t_next": _times(trajectories, 1, size)})
        self._draw_noise(buffers, trajectories)
        drawn = stream.record()
        _gather(self._context, buffers, "x", states)
        buffers.step()
        if combines(trajectories):
            self._combine(buffers, trajectories)
        buffers.check()
        x, flags = block.address("x_next"), block.address("finite")
        for one, state in zip(trajectories, states, strict=True):
            row = FLAG_BYTES * len(one)
            if one.evaluation.weights is None and "base" in state.block.nbytes:
                stream.copy(state.block.address("base"), state.block.address("x"), state.block.nbytes["x"])
            stream.copy(state.block.address("x"), x, state.block.nbytes["x"])
            stream.copy(state.block.address("finite") + state.flags_written * row, flags, row)
            x, flags = x + state.block.nbytes["x"], flags + row
            state.flags_written += 1
        end = stream.record()
        self._queued.append(end)
        for one in trajectories:
            one.parts += (TimedPart("noise", start, drawn), TimedPart("step", drawn, end))

    def decode(self, trajectories: Sequence[Trajectory], buffers: StaticBuffers) -> DeviceTensor:
        """Decode the states in one batch. The next run of the decoder overwrites the result."""
        _gather(self._context, buffers, "x", [one.state for one in trajectories])
        return buffers.decode()

    def forget(self) -> None:
        """Drop what refers to earlier steps."""
        self._queued.clear()

    def _draw_noise(self, buffers: StaticBuffers, trajectories: Sequence[Trajectory]) -> None:
        """Compute the noise of the next evaluation of each trajectory. The graph takes one draw number for the whole batch."""
        stream, block = self._context.stream, buffers.block
        draws = sorted({one.evaluations_done + 1 for one in trajectories})
        for draw in draws:
            block.upload({"draw": draw, "scale": 1.0})
            buffers.noise()
            at = 0
            for one in trajectories if len(draws) > 1 else ():
                nbytes = one.state.block.nbytes["x"]
                if one.evaluations_done + 1 == draw:  # x_next is free until the step
                    stream.copy(block.address("x_next") + at, block.address("noise") + at, nbytes)
                at += nbytes
        if len(draws) > 1:
            stream.copy(block.address("noise"), block.address("x_next"), block.nbytes["noise"])

    def _combine(self, buffers: StaticBuffers, trajectories: Sequence[Trajectory]) -> None:
        """Combine the evaluation's result in ``x_next`` with ``x`` and ``base``. ``noise`` is no longer needed and takes a copy of the result."""
        copy, to, x = self._context.stream.copy, buffers.block.address("base"), buffers.block.address("x")
        for one in trajectories:
            nbytes = one.state.block.nbytes["x"]
            copy(to, x if one.evaluation.weights is None else one.state.block.address("base"), nbytes)
            to, x = to + nbytes, x + nbytes
        weights = weights_of(trajectories)
        padding = np.tile(np.array(IDENTITY_WEIGHTS, np.float32), (buffers.size - len(weights), 1))
        buffers.block.upload({"weights": np.concatenate([weights, padding])})
        copy(buffers.block.address("noise"), buffers.block.address("x_next"), buffers.block.nbytes["noise"])
        buffers.combine()


def _load(context: CudaContext, buffers: StaticBuffers, trajectories: Sequence[Trajectory], states: Sequence[DeviceState]) -> None:
    """Copy the seeds and conditioning into the buffers, unless they are there already."""
    serials = tuple(state.serial for state in states)
    if buffers.loaded != serials:
        for name in ("seeds", *(f"conditioning {name}" for name in trajectories[0].call.conditioning)):
            _gather(context, buffers, name, states)
        buffers.loaded = serials


def _gather(context: CudaContext, buffers: StaticBuffers, name: str, states: Sequence[DeviceState]) -> None:
    """Copy a tensor of each state side by side into the buffers."""
    to = buffers.block.address(name)
    for state in states:
        context.stream.copy(to, state.block.address(name), state.block.nbytes[name])
        to += state.block.nbytes[name]


def _times(trajectories: Sequence[Trajectory], index: int, size: int) -> float | NDArray[np.float64]:
    """Return ``t`` (index 0) or ``t_next`` (index 1) of the next evaluation for each row, or a single number for a single trajectory."""
    times = [(one.evaluation.t, one.evaluation.t_next)[index] for one in trajectories]
    if len(times) == 1:
        return times[0]
    rows = np.repeat(times, [len(one) for one in trajectories])
    return np.pad(rows, (0, size - len(rows)), "edge")
