"""The engine for CUDA devices: states stay in device memory from noise to pixels, and work is enqueued on one stream ahead of the device.

A call without a callback is computed as a whole, in one CUDA graph (``whole_call``). Calls with callbacks, and requests that join a running batch, are
evaluated step by step (``stepwise``). Batches are padded to a few sizes (``batch_sizes``), whose graphs are captured once. Only one flag per sample and step
and the pixels are copied to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.manifest import Dtype, Manifest
from scm_runtime.engines.cuda.batches import Batches
from scm_runtime.engines.cuda.capture import EngineSessions
from scm_runtime.engines.cuda.device_state import DeviceState, FinishedState
from scm_runtime.engines.cuda.dlpack import DeviceArray
from scm_runtime.engines.cuda.handles import TimingEvent
from scm_runtime.engines.cuda.stepwise import Stepwise
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.engines.cuda.whole_call import WholeCall, WholeResult, plan_of
from scm_runtime.engines.engine import Output, TimedPart, Trajectory
from scm_runtime.engines.sessions import BundleSessions
from scm_runtime.errors import GeneratorClosedError
from scm_runtime.ort.session import DeviceTensor

Result = TypeVar("Result")

_leaked_on_purpose: list[Any] = []  # sessions whose destructors would abort the process, because their device's context is lost


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
        self._open_batches: Batches | None = Batches(context, sessions, dtype, manifest)
        self._stepwise = Stepwise(context, manifest)

    @property
    def cuda_graph(self) -> bool:
        """Whether runs of the step graph are captured as CUDA graphs, and none of their captures has failed for another reason than memory."""
        return self._open_batches is not None and self._open_batches.captures

    @property
    def captured_batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes with a CUDA graph, in increasing order."""
        return self._batches.captured_sizes()

    def keep_batch_size(self, batch_size: int) -> None:
        """Capture batches of exactly this size, instead of padding them."""
        self._batches.keep_size(batch_size)

    def run(self, job: Callable[[], Result], *, brief: bool = False) -> Result:
        """Run a job in the context's thread, and return its result or raise its error. See ``CudaContext.run``."""
        return self._context.run(job)

    def in_one_run(self, work: Callable[[], Result]) -> Result:
        """Do work: what is on a stream is not terminated."""
        return work()

    def sample(self, trajectories: Sequence[Trajectory], outputs: Sequence[Output]) -> bool:
        """Compute the trajectories from noise to their outputs in one CUDA graph. Returns False if that is not possible: nothing is done then."""
        plan = plan_of([one.call for one in trajectories], decodes=any(output != "state" for output in outputs))
        if plan is None or not self._batches.computes_whole(trajectories, plan):
            return False
        n, state, decoded = sum(map(len, trajectories)), "state" in outputs, "pixels" in outputs

        def compute(size: int) -> tuple[WholeCall, WholeResult]:
            work = self._batches.whole_call(trajectories, plan, size)
            work([one.call for one in trajectories])
            return work, work.read(n, state=state, decoded=decoded)

        work, result = self._batches.at_padded_size(trajectories, compute)
        parts, at = work.parts(copies=state or decoded), 0
        for one in trajectories:
            rows = slice(at, at + len(one))
            own = result if len(trajectories) == 1 else WholeResult(result.finite[:, rows], _rows(result.state, rows), _rows(result.decoded, rows))
            decoded_rows = None if work.decoded is None else _rows_on_device(work.decoded, rows)
            one.state = FinishedState(work.block, _rows_on_device(work.state, rows), decoded_rows, own)
            one.parts += parts
            at = rows.stop
        return True

    def start(self, trajectory: Trajectory) -> None:
        """Upload the call's seeds and conditioning, and compute the initial state from its latents or from noise of draw 0."""
        batches = self._batches
        batches.at_padded_size([trajectory], lambda size: self._stepwise.start(trajectory, batches.static_buffers([trajectory], size)))

    def step(self, trajectories: Sequence[Trajectory]) -> None:
        """Enqueue the next evaluation of each trajectory, all in one batch. Waits while two earlier ones are not finished."""
        batches = self._batches
        batches.at_padded_size(trajectories, lambda size: self._stepwise.step(trajectories, batches.static_buffers(trajectories, size)))

    def read_state(self, trajectory: Trajectory) -> NDArray[np.float32]:
        """Copy the state to the host: float32, ``[n, *sample]``."""
        state = trajectory.state
        if isinstance(state, FinishedState) and state.result.state is not None:
            return state.result.state
        start, x = self.timestamp(), self._state_tensor(trajectory)
        array = self._context.stream.download(x.address, x.shape, x.dtype)
        trajectory.parts.append(TimedPart("copy", start, self.timestamp()))
        return cast("NDArray[np.float32]", array)

    def set_state(self, trajectory: Trajectory, x: NDArray[np.float32]) -> None:
        """Replace the state with a finite host array."""
        self._batches.with_memory([trajectory], lambda: self._make_steppable(trajectory))
        trajectory.state.block.upload({"x": x})
        trajectory.state.flags_written = 0

    def finite_flags(self, trajectory: Trajectory) -> NDArray[np.bool_]:
        """Return which samples are finite after each evaluation since the state was last set: bool, ``[evaluations, n]``."""
        state = trajectory.state
        if isinstance(state, FinishedState):
            return state.result.finite
        if not state.flags_written:
            return np.ones((0, len(trajectory)), np.bool_)
        flags = self._context.stream.download(state.block.address("finite"), (state.flags_written, len(trajectory)), np.float32)
        return cast("NDArray[np.bool_]", flags == 0)

    def all_finite(self, trajectory: Trajectory) -> bool:
        """Return True if all of ``finite_flags`` are True."""
        return bool(self.finite_flags(trajectory).all())

    def decode(self, trajectories: Sequence[Trajectory]) -> list[NDArray[Any]]:
        """Return the decoder's outputs of each trajectory on the host. States that are not decoded yet are decoded in one batch."""
        decoded = {one: one.state.result.decoded for one in trajectories if isinstance(one.state, FinishedState) and one.state.result.decoded is not None}
        if waiting := [one for one in trajectories if one not in decoded]:
            decoded |= zip(waiting, self._decode(waiting), strict=True)
        return [decoded[one] for one in trajectories]

    def _decode(self, trajectories: Sequence[Trajectory]) -> list[NDArray[Any]]:
        start, n = self.timestamp(), sum(map(len, trajectories))
        result = self._run_decoder(trajectories)
        end = self.timestamp()
        array = self._context.stream.download(result.address, (n, *result.shape[1:]), result.dtype)
        copied, at, results = self.timestamp(), 0, []
        for one in trajectories:
            one.parts += (TimedPart("decode", start, end), TimedPart("copy", end, copied))
            results.append(array[at : (at := at + len(one))])
        return results if len(results) == 1 else [part.copy() for part in results]

    def _run_decoder(self, trajectories: Sequence[Trajectory]) -> DeviceTensor:
        """Decode the states in one batch. The next run of the decoder overwrites the result."""

        def decode(size: int) -> DeviceTensor:
            for one in trajectories:
                self._make_steppable(one)
            return self._stepwise.decode(trajectories, self._batches.static_buffers(trajectories, size))

        return self._batches.at_padded_size(trajectories, decode)

    def decode_on_device(self, trajectory: Trajectory) -> DeviceArray:
        """Decode the state, unless that was done, and return a copy of the output in device memory."""
        stream, output, state = self._context.stream, self._manifest.output, trajectory.state
        shape, dtype = (len(trajectory), *output.shape), np.dtype(np.uint8 if output.kind == "image" else np.float32)
        nbytes = dtype.itemsize * prod(shape)
        # Before the decoder runs: if memory runs out here, the buffers that hold its result are freed.
        buffer = self._batches.with_memory([trajectory], lambda: stream.allocate(nbytes))
        decoded = state.decoded if isinstance(state, FinishedState) else None
        result = decoded or self._run_decoder([trajectory])
        stream.copy(buffer.address, result.address, nbytes)
        stream.share(buffer)
        return DeviceArray(stream, buffer, shape, dtype)

    def timestamp(self) -> TimingEvent:
        """Enqueue a timing event and return it."""
        return self._context.stream.record()

    def elapsed(self, start: TimingEvent, end: TimingEvent) -> float:
        """Return the seconds between two timing events. Waits for ``end``. May be called from any thread."""
        if self._context.is_current:
            return self._context.stream.elapsed(start, end)
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
            graphs, batches = self.graphs(), self._batches
            self._graphs = self._open_batches = None  # dropped in this thread
            self._stepwise.forget()
            self._context.stream.synchronize()
            batches.clear()
            graphs.end_profiling()

        try:
            if self._context.context_lost:
                _leaked_on_purpose.append((self._graphs, self._open_batches))
            else:
                self._context.run(free)
        finally:
            self._graphs = self._open_batches = None
            self._context.release()

    @property
    def _batches(self) -> Batches:
        assert self._open_batches is not None, "the engine is closed"
        return self._open_batches

    def _state_tensor(self, trajectory: Trajectory) -> DeviceTensor:
        """Return where a trajectory's state is on the device."""
        state = trajectory.state
        return state.state if isinstance(state, FinishedState) else cast(DeviceTensor, state.block.tensor("x"))

    def _make_steppable(self, trajectory: Trajectory) -> None:
        """Copy a state of a call that was computed as a whole to memory of its own."""
        if isinstance(trajectory.state, FinishedState):
            x, state = self._state_tensor(trajectory), DeviceState(self._context, trajectory, self._manifest.sample.shape)
            self._context.stream.copy(state.block.address("x"), x.address, state.block.nbytes["x"])
            trajectory.state = state


def _rows(array: NDArray[Any] | None, rows: slice) -> NDArray[Any] | None:
    """Return a copy of some rows: a view would keep the results of all trajectories in memory."""
    return None if array is None else array[rows].copy()


def _rows_on_device(tensor: DeviceTensor, rows: slice) -> DeviceTensor:
    """Return some rows of a tensor."""
    if rows == slice(0, tensor.shape[0]):
        return tensor
    row_nbytes = np.dtype(tensor.dtype).itemsize * prod(tensor.shape[1:])
    return DeviceTensor(tensor.address + rows.start * row_nbytes, tensor.dtype, (rows.stop - rows.start, *tensor.shape[1:]))
