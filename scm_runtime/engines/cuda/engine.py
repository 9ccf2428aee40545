"""The engine for CUDA devices: states stay in device memory from noise to pixels, and work is enqueued on one stream ahead of the device.

A call's seeds and conditioning are uploaded once. A step copies the states of its trajectories side by side into static buffers (``static_buffers``), runs
the noise graph and the step graph there, and copies the results back. Merged trajectories may be at different steps. Only one flag per sample and step and
the pixels are copied to the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from math import prod
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.manifest import Dtype, Manifest
from scm_runtime.engines.cuda.blocks import TensorBlock
from scm_runtime.engines.cuda.capture import EngineSessions
from scm_runtime.engines.cuda.dlpack import DeviceArray
from scm_runtime.engines.cuda.static_buffers import BatchShape, StaticBufferCache, StaticBuffers
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.engines.engine import TimedPart, Trajectory, combines, weights_of
from scm_runtime.engines.sessions import BundleSessions
from scm_runtime.errors import GeneratorClosedError, OutOfMemoryError
from scm_runtime.ort.session import DeviceTensor

Result = TypeVar("Result")

FLAG_BYTES = 4  # float32
MAX_QUEUED_STEPS = 2  # one runs and the next is ready; a call that is cancelled cannot take back what is queued
_serial_numbers = count(1)
_leaked_on_purpose: list[Any] = []  # sessions whose destructors would abort the process, because their device's context is lost


class _State:
    """The seeds, conditioning, state and finite flags of one trajectory in device memory."""

    def __init__(self, context: CudaContext, trajectory: Trajectory, shape: tuple[int, ...]) -> None:
        call = trajectory.call
        n, evaluations = len(trajectory), call.evaluations
        state = (np.float32, (n, *shape))
        conditioning = {f"conditioning {name}": value for name, value in call.conditioning.items()}
        self.block = TensorBlock(
            context,
            {
                "seeds": (np.int64, (n,)),
                **{name: (value.dtype.type, value.shape) for name, value in conditioning.items()},
                "finite": (np.float32, (len(evaluations), n)),
                "x": state,
                **({"base": state} if any(one.weights is not None for one in evaluations) else {}),
            },
        )
        self.block.upload({"seeds": call.seeds, **conditioning})
        self.serial = next(_serial_numbers)
        self.flags_written = 0
        """Number of evaluations whose flags are in ``finite``."""


class CudaEngine:
    """The ``engine.Engine`` for CUDA devices. It runs jobs one after another, in the context's thread."""

    asynchronous = True

    def __init__(self, context: CudaContext, graphs: BundleSessions, sessions: EngineSessions, dtype: Dtype, manifest: Manifest) -> None:
        """Create an engine over open sessions on the context's device. ``open_engine.open_cuda_engine`` opens them."""
        context.retain()
        self.dtype: Dtype = dtype
        self.provider = graphs.step.provider
        self._context, self._manifest = context, manifest
        self._graphs: BundleSessions | None = graphs
        self._buffer_cache: StaticBufferCache | None = StaticBufferCache(context, sessions, manifest)
        self._queued_steps: deque[Any] = deque()  # events at the ends of the latest steps

    @property
    def cuda_graph(self) -> bool:
        """Whether runs of the step graph are captured as CUDA graphs."""
        return self._buffer_cache is not None and self._buffer_cache.sessions.step.capture_enabled

    def run(self, job: Callable[[], Result]) -> Result:
        """Run a job in the context's thread, and return its result or raise its error. See ``CudaContext.run``."""
        return self._context.run(job)

    def start(self, trajectory: Trajectory) -> None:
        """Upload the call's seeds and conditioning, and compute the initial state from its latents or from noise of draw 0."""
        with self._recover_from_out_of_memory([trajectory]):
            start, call, scale = self.timestamp(), trajectory.call, self._manifest.initial_scale
            trajectory.state = state = _State(self._context, trajectory, self._manifest.sample.shape)
            if call.latents is None:
                self._draw_noise([trajectory], 0, scale, state.block.address("x"))
            else:
                state.block.upload({"x": call.latents * np.float32(scale)})
            trajectory.parts.append(TimedPart("noise", start, self.timestamp()))

    def step(self, trajectories: Sequence[Trajectory]) -> None:
        """Enqueue the next evaluation of each trajectory, all in one batch. Waits while MAX_QUEUED_STEPS earlier ones are not finished."""
        if len(self._queued_steps) == MAX_QUEUED_STEPS:
            self._context.stream.wait_for(self._queued_steps.popleft())
        copy = self._context.stream.copy
        with self._recover_from_out_of_memory(trajectories):
            start, buffers = self.timestamp(), self._buffers_for(trajectories)
            block, draws = buffers.block, {one.evaluations_done + 1 for one in trajectories}
            if len(draws) > 1:  # the graph takes one draw number for the whole batch
                to = block.address("noise")
                for one in trajectories:
                    self._draw_noise([one], one.evaluations_done + 1, 1.0, to)
                    to += one.state.block.nbytes["x"]
            self._load_inputs(buffers, trajectories)
            block.upload({"t": _times(trajectories, 0), "t_next": _times(trajectories, 1), "draw": min(draws), "scale": 1.0})
            if len(draws) == 1:
                buffers.noise()
            drawn = self.timestamp()
            self._gather(buffers, "x", trajectories)
            buffers.step()
            if combines(trajectories):
                self._combine(buffers, trajectories)
            buffers.check()
            x, flags = block.address("x_next"), block.address("finite")
            for one in trajectories:
                state, row = one.state, FLAG_BYTES * len(one)
                if one.evaluation.weights is None and "base" in state.block.nbytes:
                    copy(state.block.address("base"), state.block.address("x"), state.block.nbytes["x"])
                copy(state.block.address("x"), x, state.block.nbytes["x"])
                copy(state.block.address("finite") + state.flags_written * row, flags, row)
                x, flags = x + state.block.nbytes["x"], flags + row
                state.flags_written += 1
            end = self.timestamp()
            self._queued_steps.append(end)
            for one in trajectories:
                one.parts += (TimedPart("noise", start, drawn), TimedPart("step", drawn, end))

    def read_state(self, trajectory: Trajectory) -> NDArray[np.float32]:
        """Copy the state to the host: float32, ``[n, *sample]``."""
        start, x = self.timestamp(), trajectory.state.block.tensor("x")
        array = self._context.stream.download(x.address, x.shape, x.dtype)
        trajectory.parts.append(TimedPart("copy", start, self.timestamp()))
        return cast(NDArray[np.float32], array)

    def set_state(self, trajectory: Trajectory, x: NDArray[np.float32]) -> None:
        """Replace the state with a finite host array."""
        trajectory.state.block.upload({"x": x})
        trajectory.state.flags_written = 0

    def finite_flags(self, trajectory: Trajectory) -> NDArray[np.bool_]:
        """Return which samples are finite after each evaluation since the state was last set: bool, ``[evaluations, n]``."""
        state = trajectory.state
        if not state.flags_written:
            return np.ones((0, len(trajectory)), np.bool_)
        flags = self._context.stream.download(state.block.address("finite"), (state.flags_written, len(trajectory)), np.float32)
        return cast(NDArray[np.bool_], flags == 0)

    def decode(self, trajectories: Sequence[Trajectory]) -> list[NDArray[Any]]:
        """Decode all states in one batch, and return the outputs of each trajectory on the host."""
        with self._recover_from_out_of_memory(trajectories):
            start = self.timestamp()
            decoded = self._run_decoder(trajectories)
            end = self.timestamp()
            array = self._context.stream.download(decoded.address, decoded.shape, decoded.dtype)
            copied, at, results = self.timestamp(), 0, []
            for one in trajectories:
                one.parts += (TimedPart("decode", start, end), TimedPart("copy", end, copied))
                results.append(array[at : (at := at + len(one))])
            return results if len(results) == 1 else [result.copy() for result in results]

    def decode_on_device(self, trajectory: Trajectory) -> DeviceArray:
        """Decode the state and return a copy of the output in device memory. Waits for nothing, so the decoder's time is not measured."""
        stream = self._context.stream
        with self._recover_from_out_of_memory([trajectory]):
            result = self._run_decoder([trajectory])
            nbytes = np.dtype(result.dtype).itemsize * prod(result.shape)
            buffer = stream.allocate(nbytes)
            stream.copy(buffer.address, result.address, nbytes)
            stream.share(buffer)
            return DeviceArray(stream, buffer, result.shape, np.dtype(result.dtype))

    def timestamp(self) -> Any:
        """Enqueue a timing event and return it."""
        return self._context.stream.record()

    def elapsed(self, start: Any, end: Any) -> float:
        """Return the seconds between two timing events. Waits for ``end``. May be called from any thread."""
        return self._context.run(lambda: self._context.stream.elapsed(start, end))

    def graphs(self) -> BundleSessions:
        """Return the sessions, for graphs outside the loop. Raises GeneratorClosedError if the engine is closed."""
        if self._graphs is None:
            raise GeneratorClosedError("this Generator is closed: make a new one")
        return self._graphs

    def close(self) -> None:
        """Free the sessions and buffers, and leave the context."""
        if self._graphs is None:
            return

        def free() -> None:
            graphs, self._graphs, self._buffer_cache = self.graphs(), None, None  # dropped in this thread
            self._queued_steps.clear()
            self._context.stream.synchronize()
            graphs.end_profiling()

        try:
            if self._context.context_lost:
                _leaked_on_purpose.append((self._graphs, self._buffer_cache))
            else:
                self._context.run(free)
        finally:
            self._graphs = self._buffer_cache = None
            self._context.release()

    def _buffers_for(self, trajectories: Sequence[Trajectory]) -> StaticBuffers:
        """Return the static buffers for a batch of these trajectories."""
        dtypes = {name: value.dtype.type for name, value in trajectories[0].call.conditioning.items()}
        assert self._buffer_cache is not None, "the engine is closed"
        return self._buffer_cache.get(_batch_shape(trajectories), dtypes)

    def _load_inputs(self, buffers: StaticBuffers, trajectories: Sequence[Trajectory]) -> None:
        """Copy the seeds and conditioning into the buffers, unless they are there already."""
        serials = tuple(one.state.serial for one in trajectories)
        if buffers.loaded == serials:
            return
        for name in ("seeds", *(f"conditioning {name}" for name in trajectories[0].call.conditioning)):
            self._gather(buffers, name, trajectories)
        buffers.loaded = serials

    def _gather(self, buffers: StaticBuffers, name: str, trajectories: Sequence[Trajectory]) -> None:
        """Copy a tensor of each state side by side into the buffers."""
        to = buffers.block.address(name)
        for one in trajectories:
            block = one.state.block
            self._context.stream.copy(to, block.address(name), block.nbytes[name])
            to += block.nbytes[name]

    def _combine(self, buffers: StaticBuffers, trajectories: Sequence[Trajectory]) -> None:
        """Combine the evaluation's result in ``x_next`` with ``x`` and ``base``. ``noise`` is no longer needed and takes a copy of the result."""
        copy, to, x = self._context.stream.copy, buffers.block.address("base"), buffers.block.address("x")
        for one in trajectories:
            size = one.state.block.nbytes["x"]
            copy(to, x if one.evaluation.weights is None else one.state.block.address("base"), size)
            to, x = to + size, x + size
        buffers.block.upload({"weights": weights_of(trajectories)})
        copy(buffers.block.address("noise"), buffers.block.address("x_next"), buffers.block.nbytes["noise"])
        buffers.combine()

    def _draw_noise(self, trajectories: Sequence[Trajectory], draw: int, scale: float, to: int) -> None:
        """Compute the noise of one draw for a batch of these trajectories, and copy it to the address ``to``."""
        buffers = self._buffers_for(trajectories)
        self._load_inputs(buffers, trajectories)
        buffers.block.upload({"draw": draw, "scale": scale})
        buffers.noise()
        self._context.stream.copy(to, buffers.block.address("noise"), buffers.block.nbytes["noise"])

    def _run_decoder(self, trajectories: Sequence[Trajectory]) -> DeviceTensor:
        """Decode the states in one batch. The next run of the decoder overwrites the result."""
        buffers = self._buffers_for(trajectories)
        self._gather(buffers, "x", trajectories)
        return buffers.decode()

    @contextmanager
    def _recover_from_out_of_memory(self, trajectories: Sequence[Trajectory]) -> Iterator[None]:
        """If the device is out of memory, free what is not needed, and raise OutOfMemoryError with remedies."""
        try:
            yield
        except OutOfMemoryError as error:
            n = sum(map(len, trajectories))
            if self._buffer_cache is not None:
                self._buffer_cache.release_uncaptured(_batch_shape(trajectories))
            self._context.stream.trim()
            remedies = ["a smaller batch", *(["half precision (dtype='fp16' or 'bf16') if the bundle has it"] if self.dtype == "fp32" else [])]
            raise OutOfMemoryError(
                f"cuda:{self._context.index} is out of memory with a batch of {n} in {self.dtype}. "
                f"Try {', '.join(remedies)}, or a larger gpu_mem_limit if one is set. The Generator is still usable. ({error})"
            ) from error


def _times(trajectories: Sequence[Trajectory], index: int) -> float | NDArray[np.float64]:
    """Return ``t`` (index 0) or ``t_next`` (index 1) of the next evaluation for each sample; a single number for a single trajectory."""
    times = [(one.evaluation.t, one.evaluation.t_next)[index] for one in trajectories]
    return times[0] if len(times) == 1 else np.repeat(times, [len(one) for one in trajectories])


def _batch_shape(trajectories: Sequence[Trajectory]) -> BatchShape:
    """Return the shape of a batch of all samples of these trajectories."""
    sizes = tuple((name, value.shape[1:]) for name, value in sorted(trajectories[0].call.conditioning.items()))
    return sum(map(len, trajectories)), sizes
