"""The buffers and CUDA graphs of an engine by batch shape, and the size at which a batch runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import numpy as np

from scm_runtime.bundle.manifest import Dtype, Manifest
from scm_runtime.common.log import log
from scm_runtime.engines.cuda.batch_sizes import BatchSizes
from scm_runtime.engines.cuda.capture import CaptureSwitch, EngineSessions
from scm_runtime.engines.cuda.cuda_errors import PinnedMemoryError
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
    """

    def __init__(self, context: CudaContext, sessions: EngineSessions, dtype: Dtype, manifest: Manifest) -> None:
        """Start without buffers."""
        self._context, self.sessions, self._dtype, self._manifest = context, sessions, dtype, manifest
        self._all_on_device = all(session.all_on_device for session in sessions.all)
        self._captures_whole_calls = self._all_on_device and sessions.step.switch.enabled  # unless it turns out that CUDA refuses
        self._whole_calls = CaptureSwitch(self._captures_whole_calls)
        self._sizes = BatchSizes(pads=any(session.switch.enabled for session in sessions.all))
        self._cache: ShapeCache[StaticBuffers | WholeCall] = ShapeCache()

    @property
    def captures(self) -> bool:
        """Whether runs of the step graph are captured as CUDA graphs."""
        return self.sessions.step.switch.enabled

    def computes_whole(self, trajectories: Sequence[Trajectory], plan: CallPlan) -> bool:
        """Return whether calls of these trajectories are computed as a whole.

        All nodes must be on the device. Once a capture has failed, only calls whose graphs exist are: the parts of others can be captured.
        """
        if not self._captures_whole_calls:
            return self._all_on_device
        if self._whole_calls.enabled and all(session.switch.enabled for session in self.sessions.all):
            return True
        return (_batch_shape(trajectories, self._sizes.padded(sum(map(len, trajectories)))), plan) in self._cache.captured()

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
        """Do work that takes the size at which a batch of these trajectories runs.

        If memory runs out, free what is not needed and do the work again; if that does not help, without padding.

        Raises:
            OutOfMemoryError: memory runs out each time. What is not needed was freed.
        """
        n = sum(map(len, trajectories))
        size = self._sizes.padded(n)
        rows, result = self._with_memory(trajectories, (size, size, n) if size != n else (n, n), work)
        if rows != size and size not in self.captured_sizes() and self._sizes.drop(size):
            log.info("The memory of cuda:%d does not suffice for a batch of %d: batches of %d are not padded to it any more.", self._context.index, size, n)
        return result

    def with_memory(self, trajectories: Sequence[Trajectory], work: Callable[[], Result]) -> Result:
        """Do work that allocates memory for these trajectories. If memory runs out, free what is not needed and do it again. Raises OutOfMemoryError."""
        n = sum(map(len, trajectories))
        return self._with_memory(trajectories, (n, n), lambda _: work())[1]

    def _with_memory(self, trajectories: Sequence[Trajectory], sizes: Sequence[int], work: Callable[[int], Result]) -> tuple[int, Result]:
        """Do work at the first of some sizes for which the memory suffices. Return the size and the result."""
        for size in sizes:
            try:
                return size, work(size)
            except PinnedMemoryError:
                raise
            except OutOfMemoryError as error:
                message, cause = str(error), error.__cause__ and error.__cause__.with_traceback(None)
            # The error is dropped now, and with it the frames of the failed work: what they held can be freed.
            self._free_memory(trajectories, size)
        raise self._out_of_memory(sum(map(len, trajectories)), message) from cause

    def clear(self) -> None:
        """Drop all buffers and graphs, whose work must be done."""
        self._cache.clear()

    def _free_memory(self, trajectories: Sequence[Trajectory], size: int) -> None:
        """Free the buffers for single evaluations of this batch, and all without a captured graph. Let the arenas shrink at the next run."""
        evaluations = _batch_shape(trajectories, size), None  # some of their parts may be captured
        self._cache.release(lambda key: key == evaluations)
        for session in self.sessions.all:
            session.shrink_arena = True
        self._context.stream.trim()

    def _out_of_memory(self, n: int, message: str) -> OutOfMemoryError:
        remedies = ["a smaller batch", *(["half precision (dtype='fp16' or 'bf16') if the bundle has it"] if self._dtype == "fp32" else [])]
        return OutOfMemoryError(
            f"cuda:{self._context.index} is out of memory with a batch of {n} in {self._dtype}. "
            f"Try {', '.join(remedies)}, or a larger gpu_mem_limit if one is set. The Generator is still usable. ({message})"
        )


def _batch_shape(trajectories: Sequence[Trajectory], size: int) -> BatchShape:
    """Return the shape of a batch of these trajectories that is padded to a size."""
    return size, tuple((name, value.shape[1:]) for name, value in sorted(trajectories[0].call.conditioning.items()))


def _dtypes(trajectories: Sequence[Trajectory]) -> dict[str, type[np.generic]]:
    return {name: value.dtype.type for name, value in trajectories[0].call.conditioning.items()}
