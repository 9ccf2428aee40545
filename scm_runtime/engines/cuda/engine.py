"""The engine on a CUDA device: states stay in its memory from noise to pixels, and everything is put on one stream without waiting.

A call's seeds and conditioning are uploaded once. A step copies the states of its trajectories side by side into a slot (``cuda_slots``), runs noise and
step there and copies the result back; merged trajectories may stand at different steps. What goes to the host is one flag a sample and step, and pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from math import prod
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.manifest import Dtype, Manifest
from scm_runtime.engines.cuda.dlpack import DeviceArray
from scm_runtime.engines.cuda.slots import Block, Graphed, Key, Slot, Slots
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.engines.engine import TimedPart, Trajectory, combines, weights_of
from scm_runtime.engines.sessions import BundleSessions
from scm_runtime.errors import GeneratorClosedError, OutOfMemoryError
from scm_runtime.ort.session import DeviceTensor

Result = TypeVar("Result")

FLAG_BYTES = 4  # float32
_serials = count(1)
_lost: list[Any] = []  # what ONNX Runtime would end the process over, were it to destroy it without a device


class _State:
    """One trajectory in the device's memory."""

    def __init__(self, context: CudaContext, trajectory: Trajectory, shape: tuple[int, ...]) -> None:
        call = trajectory.call
        n, evaluations = len(trajectory), call.evaluations
        state = (np.float32, (n, *shape))
        given = {f"given {name}": value for name, value in call.conditioning.items()}
        self.block = Block(
            context,
            {
                "seeds": (np.int64, (n,)),
                **{name: (value.dtype.type, value.shape) for name, value in given.items()},
                "finite": (np.float32, (len(evaluations), n)),
                "x": state,
                **({"base": state} if any(one.weights is not None for one in evaluations) else {}),
            },
        )
        self.block.upload({"seeds": call.seeds, **given})
        self.serial = next(_serials)
        self.checked = 0
        """How many evaluations have flags."""


class CudaEngine:
    """See ``engine.Engine``. Jobs of ``run`` are done one after the other, in the context's thread."""

    asynchronous = True

    def __init__(self, context: CudaContext, graphs: BundleSessions, graphed: Graphed, dtype: Dtype, manifest: Manifest) -> None:
        """Work with open graphs, on the context's device: see ``open_engine.open_cuda_engine``."""
        context.retain()
        self.dtype: Dtype = dtype
        self.provider = graphs.step.provider
        self._context, self._manifest = context, manifest
        self._graphs: BundleSessions | None = graphs
        self._slots: Slots | None = Slots(context, graphed, manifest)

    @property
    def cuda_graph(self) -> bool:
        """Whether the step graph is, or will be, captured."""
        return self._slots is not None and self._slots.graphs.step.capture

    @property
    def captured(self) -> int:
        """How many CUDA graphs of the step graph there are: one a shape of batches."""
        return 0 if self._slots is None else self._slots.graphs.step.captured

    def run(self, job: Callable[[], Result]) -> Result:
        """See Engine and ``CudaContext.run``."""
        return self._context.run(job)

    def start(self, trajectory: Trajectory) -> None:
        """See Engine."""
        with self._memory_for([trajectory]):
            start, call, scale = self.timestamp(), trajectory.call, self._manifest.initial_scale
            trajectory.state = state = _State(self._context, trajectory, self._manifest.sample.shape)
            if call.latents is None:
                self._draw([trajectory], 0, scale, state.block.address("x"))
            else:
                state.block.upload({"x": call.latents * np.float32(scale)})
            trajectory.parts.append(TimedPart("noise", start, self.timestamp()))

    def step(self, trajectories: Sequence[Trajectory]) -> None:
        """See Engine."""
        copy = self._context.gpu.copy
        with self._memory_for(trajectories):
            start, slot = self.timestamp(), self._slot(trajectories)
            block, draws = slot.block, {one.evaluations_done + 1 for one in trajectories}
            if len(draws) > 1:  # the draw is one number an evaluation
                to = block.address("noise")
                for one in trajectories:
                    self._draw([one], one.evaluations_done + 1, 1.0, to)
                    to += one.state.block.sizes["x"]
            self._load(slot, trajectories)
            block.upload({"t": _times(trajectories, 0), "t_next": _times(trajectories, 1), "draw": min(draws), "scale": 1.0})
            if len(draws) == 1:
                slot.noise()
            drawn = self.timestamp()
            self._gather(slot, "x", trajectories)
            slot.step()
            if combines(trajectories):
                self._combine(slot, trajectories)
            slot.check()
            x, flags = block.address("x_next"), block.address("finite")
            for one in trajectories:
                state, row = one.state, FLAG_BYTES * len(one)
                if one.evaluation.weights is None and "base" in state.block.sizes:
                    copy(state.block.address("base"), state.block.address("x"), state.block.sizes["x"])
                copy(state.block.address("x"), x, state.block.sizes["x"])
                copy(state.block.address("finite") + state.checked * row, flags, row)
                x, flags = x + state.block.sizes["x"], flags + row
                state.checked += 1
            end = self.timestamp()
            for one in trajectories:
                one.parts += (TimedPart("noise", start, drawn), TimedPart("step", drawn, end))

    def read_state(self, trajectory: Trajectory) -> NDArray[np.float32]:
        """See Engine."""
        start, x = self.timestamp(), trajectory.state.block.region("x")
        array = self._context.gpu.download(x.address, x.shape, x.dtype)
        trajectory.parts.append(TimedPart("copy", start, self.timestamp()))
        return cast(NDArray[np.float32], array)

    def set_state(self, trajectory: Trajectory, x: NDArray[np.float32]) -> None:
        """See Engine."""
        trajectory.state.block.upload({"x": x})
        trajectory.state.checked = 0

    def finite_flags(self, trajectory: Trajectory) -> NDArray[np.bool_]:
        """See Engine."""
        state = trajectory.state
        if not state.checked:
            return np.ones((0, len(trajectory)), np.bool_)
        flags = self._context.gpu.download(state.block.address("finite"), (state.checked, len(trajectory)), np.float32)
        return cast(NDArray[np.bool_], flags == 0)

    def decode(self, trajectories: Sequence[Trajectory]) -> list[NDArray[Any]]:
        """See Engine."""
        with self._memory_for(trajectories):
            start = self.timestamp()
            decoded = self._decoded(trajectories)
            end = self.timestamp()
            array = self._context.gpu.download(decoded.address, decoded.shape, decoded.dtype)
            copied, at, results = self.timestamp(), 0, []
            for one in trajectories:
                one.parts += (TimedPart("decode", start, end), TimedPart("copy", end, copied))
                results.append(array[at : (at := at + len(one))])
            return results if len(results) == 1 else [result.copy() for result in results]

    def decode_on_device(self, trajectory: Trajectory) -> DeviceArray:
        """See Engine. Nothing waits for the device, so that how long the decoder takes is not measured."""
        gpu = self._context.gpu
        with self._memory_for([trajectory]):
            result = self._decoded([trajectory])
            nbytes = np.dtype(result.dtype).itemsize * prod(result.shape)
            memory = gpu.allocate(nbytes)
            gpu.copy(memory.address, result.address, nbytes)
            gpu.hand_out(memory)
            return DeviceArray(gpu, memory, result.shape, np.dtype(result.dtype))

    def timestamp(self) -> Any:
        """See Engine: an event on the stream."""
        return self._context.gpu.record()

    def elapsed(self, start: Any, end: Any) -> float:
        """See Engine. From any thread."""
        return self._context.run(lambda: self._context.gpu.seconds(start, end))

    def graphs(self) -> BundleSessions:
        """See Engine."""
        if self._graphs is None:
            raise GeneratorClosedError("this Generator is closed: make a new one")
        return self._graphs

    def close(self) -> None:
        """See Engine."""
        if self._graphs is None:
            return

        def give_back() -> None:
            graphs, self._graphs, self._slots = self.graphs(), None, None
            self._context.gpu.synchronize()
            graphs.end_profiling()

        try:
            if self._context.lost:
                _lost.append((self._graphs, self._slots))
            else:
                self._context.run(give_back)
        finally:
            self._graphs = self._slots = None
            self._context.release()

    def _slot(self, trajectories: Sequence[Trajectory]) -> Slot:
        dtypes = {name: value.dtype.type for name, value in trajectories[0].call.conditioning.items()}
        assert self._slots is not None, "the engine is closed"
        return self._slots.get(_key(trajectories), dtypes)

    def _load(self, slot: Slot, trajectories: Sequence[Trajectory]) -> None:
        """Seeds and conditioning, where others stand."""
        whose = tuple(one.state.serial for one in trajectories)
        if slot.loaded == whose:
            return
        for name in ("seeds", *(f"given {name}" for name in trajectories[0].call.conditioning)):
            self._gather(slot, name, trajectories)
        slot.loaded = whose

    def _gather(self, slot: Slot, name: str, trajectories: Sequence[Trajectory]) -> None:
        """A tensor of each, side by side in the slot."""
        to = slot.block.address(name)
        for one in trajectories:
            block = one.state.block
            self._context.gpu.copy(to, block.address(name), block.sizes[name])
            to += block.sizes[name]

    def _combine(self, slot: Slot, trajectories: Sequence[Trajectory]) -> None:
        """Put what the step gave together with the states, in its place. The noise is not needed any more: its place takes the result."""
        copy, to, x = self._context.gpu.copy, slot.block.address("base"), slot.block.address("x")
        for one in trajectories:
            size = one.state.block.sizes["x"]
            copy(to, x if one.evaluation.weights is None else one.state.block.address("base"), size)
            to, x = to + size, x + size
        slot.block.upload({"weights": weights_of(trajectories)})
        copy(slot.block.address("noise"), slot.block.address("x_next"), slot.block.sizes["noise"])
        slot.combine()

    def _draw(self, trajectories: Sequence[Trajectory], draw: int, scale: float, to: int) -> None:
        """Noise of one draw, in the trajectories' slot and from there to where it is wanted."""
        slot = self._slot(trajectories)
        self._load(slot, trajectories)
        slot.block.upload({"draw": draw, "scale": scale})
        slot.noise()
        self._context.gpu.copy(to, slot.block.address("noise"), slot.block.sizes["noise"])

    def _decoded(self, trajectories: Sequence[Trajectory]) -> DeviceTensor:
        slot = self._slot(trajectories)
        self._gather(slot, "x", trajectories)
        return slot.decode()

    @contextmanager
    def _memory_for(self, trajectories: Sequence[Trajectory]) -> Iterator[None]:
        """Where memory does not suffice, give back what is not needed, and say what would help."""
        try:
            yield
        except OutOfMemoryError as error:
            n = sum(map(len, trajectories))
            if self._slots is not None:
                self._slots.give_back(_key(trajectories))
            self._context.gpu.trim()
            remedies = ["a smaller batch", *(["half precision, dtype='fp16' or 'bf16', where the bundle has it"] if self.dtype == "fp32" else [])]
            raise OutOfMemoryError(
                f"the memory of cuda:{self._context.index} does not suffice for a batch of {n} in {self.dtype}. "
                f"Try {', '.join(remedies)}, or a larger gpu_mem_limit if one is set. The Generator goes on working. ({error})"
            ) from error


def _times(trajectories: Sequence[Trajectory], ahead: int) -> float | NDArray[np.float64]:
    """Of each sample."""
    times = [(one.evaluation.t, one.evaluation.t_next)[ahead] for one in trajectories]
    return times[0] if len(times) == 1 else np.repeat(times, [len(one) for one in trajectories])


def _key(trajectories: Sequence[Trajectory]) -> Key:
    sizes = tuple((name, value.shape[1:]) for name, value in sorted(trajectories[0].call.conditioning.items()))
    return sum(map(len, trajectories)), sizes
