"""The buffers and CUDA graphs of an engine by batch shape, and the size at which a batch runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import numpy as np

from scm_runtime.bundle.manifest import Dtype, Manifest
from scm_runtime.common.log import log
from scm_runtime.engines.cuda.batch_sizes import BatchSizes
from scm_runtime.engines.cuda.capture import CaptureSwitch, EngineSessions
from scm_runtime.engines.cuda.shape_cache import ShapeCache
from scm_runtime.engines.cuda.static_buffers import BatchShape, StaticBuffers
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.engines.cuda.whole_call import CallPlan, WholeCall
from scm_runtime.engines.engine import Trajectory
from scm_runtime.errors import OutOfMemoryError

Result = TypeVar("Result")


class Batches:
    """What an engine keeps for the batch shapes that it computes.

    Attributes:
        sessions: the sessions of the engine.
        computes_whole_calls: whether calls can be computed as a whole: all nodes of all graphs are on the device.
    """

    def __init__(self, context: CudaContext, sessions: EngineSessions, dtype: Dtype, manifest: Manifest) -> None:
        """Start without buffers."""
        self._context, self.sessions, self._dtype, self._manifest = context, sessions, dtype, manifest
        self.computes_whole_calls = all(session.all_on_device for session in sessions.all)
        self._whole_calls = CaptureSwitch(self.computes_whole_calls and sessions.step.switch.enabled)
        self._sizes = BatchSizes(pads=any(session.switch.enabled for session in sessions.all))
        self._cache: ShapeCache[StaticBuffers | WholeCall] = ShapeCache()

    @property
    def captures(self) -> bool:
        """Whether runs of the step graph are captured as CUDA graphs."""
        return self._whole_calls.enabled or self.sessions.step.switch.enabled

    def captured_sizes(self) -> tuple[int, ...]:
        """Return the batch sizes that are captured, in increasing order."""
        return tuple(sorted({cast("tuple[BatchShape, CallPlan | None]", key)[0][0] for key in self._cache.captured()}))

    def keep_size(self, size: int) -> None:
        """Capture batches of exactly this size, instead of padding them."""
        self._sizes.add(size)

    def static_buffers(self, trajectories: Sequence[Trajectory], size: int) -> StaticBuffers:
        """Return the buffers for single evaluations of a batch of these trajectories, padded to a size. Raises OutOfMemoryError."""
        shape = _batch_shape(trajectories, size)

        def make(capture: bool) -> StaticBuffers:
            return StaticBuffers(self._context, self.sessions, self._manifest, shape, _dtypes(trajectories), capture=capture)

        capture = size in self._sizes and any(session.switch.enabled for session in self.sessions.all)
        return cast(StaticBuffers, self._cache.get((shape, None), make, capture=capture))

    def whole_call(self, trajectories: Sequence[Trajectory], plan: CallPlan, size: int) -> WholeCall:
        """Return the work for calls of these trajectories, padded to a size. Raises OutOfMemoryError."""
        shape = _batch_shape(trajectories, size)

        def make(capture: bool) -> WholeCall:
            live, dtypes = self.sessions.step.live, _dtypes(trajectories)
            return WholeCall(self._context, self.sessions, self._manifest, shape, dtypes, plan, self._whole_calls, live, capture=capture)

        return cast(WholeCall, self._cache.get((shape, plan), make, capture=size in self._sizes and self._whole_calls.enabled))

    def at_padded_size(self, trajectories: Sequence[Trajectory], work: Callable[[int], Result]) -> Result:
        """Do work that takes the size at which a batch of these trajectories runs. If memory does not suffice, try it without padding.

        Raises:
            OutOfMemoryError: the device is out of memory also without padding. What is not needed was freed.
        """
        n = sum(map(len, trajectories))
        size = self._sizes.padded(n)
        try:
            return work(size)
        except OutOfMemoryError as error:
            self._free_memory(trajectories, size)
            if size == n:
                raise self._out_of_memory(n, error) from error
        try:
            result = work(n)
        except OutOfMemoryError as error:
            self._free_memory(trajectories, n)
            raise self._out_of_memory(n, error) from error
        self._sizes.drop_from(size)
        log.info("The memory of cuda:%d does not suffice for a batch of %d: batches of %d and more are not padded any more.", self._context.index, size, n)
        return result

    def clear(self) -> None:
        """Drop all buffers and graphs, whose work must be done."""
        self._cache.clear()

    def _free_memory(self, trajectories: Sequence[Trajectory], size: int) -> None:
        """Free the buffers of this batch, and those without a captured graph. Let the arenas shrink at the next run."""
        self._cache.release(lambda key: cast("tuple[BatchShape, CallPlan | None]", key)[0] == _batch_shape(trajectories, size))
        for session in self.sessions.all:
            session.shrink_arena = True
        self._context.stream.trim()

    def _out_of_memory(self, n: int, error: OutOfMemoryError) -> OutOfMemoryError:
        remedies = ["a smaller batch", *(["half precision (dtype='fp16' or 'bf16') if the bundle has it"] if self._dtype == "fp32" else [])]
        return OutOfMemoryError(
            f"cuda:{self._context.index} is out of memory with a batch of {n} in {self._dtype}. "
            f"Try {', '.join(remedies)}, or a larger gpu_mem_limit if one is set. The Generator is still usable. ({error})"
        )


def _batch_shape(trajectories: Sequence[Trajectory], size: int) -> BatchShape:
    """Return the shape of a batch of these trajectories that is padded to a size."""
    return size, tuple((name, value.shape[1:]) for name, value in sorted(trajectories[0].call.conditioning.items()))


def _dtypes(trajectories: Sequence[Trajectory]) -> dict[str, type[np.generic]]:
    return {name: value.dtype.type for name, value in trajectories[0].call.conditioning.items()}
