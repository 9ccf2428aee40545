"""The engine whose states are NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.manifest import Dtype
from scm_runtime.common.interruptible import run_interruptibly
from scm_runtime.engines.engine import Output, TimedPart, Trajectory, weights_of
from scm_runtime.engines.sessions import BundleSessions
from scm_runtime.ort.session import in_one_run

Result = TypeVar("Result")

CACHED_INPUTS, MAX_CACHED_LENGTH = 256, 1024
_ONE = np.array(1, np.float32)


@dataclass(slots=True)
class _HostState:
    x: NDArray[np.float32]  #               [n, *sample]
    base: NDArray[np.float32]  #            x at the beginning of the step
    finite: list[NDArray[np.bool_] | None] = field(default_factory=list)  # [n] per evaluation; None if all are True
    all_finite: bool = True

    def advance(self, x: NDArray[np.float32], finite: NDArray[np.bool_] | None, *, begins_step: bool) -> None:
        """Replace the state by the result of an evaluation."""
        if begins_step:
            self.base = self.x
        self.x = x
        self.finite.append(finite)
        if finite is not None and not finite.all():
            self.all_finite = False


class HostEngine:
    """The ``Engine`` for every device but CUDA: ONNX Runtime copies arrays to and from the device of its provider. Any number of threads may use it."""

    asynchronous = False
    cuda_graph = False
    captured_batch_sizes = ()

    def __init__(self, graphs: BundleSessions, dtype: Dtype, initial_scale: float) -> None:
        """Compute with open graphs.

        Args:
            graphs: the bundle's open graphs.
            dtype: their precision.
            initial_scale: the manifest's standard deviation of the first state.
        """
        self.dtype: Dtype = dtype
        self.provider = graphs.step.provider
        self._graphs, self._initial_scale = graphs, np.array(initial_scale, np.float32)

    def run(self, job: Callable[[], Result], *, brief: bool = False) -> Result:
        """Run a job on the caller's thread, or for the main thread on another unless it is brief, so that signals are handled meanwhile."""
        return run_interruptibly(job, brief=brief)

    def keep_batch_size(self, batch_size: int) -> None:
        """Do nothing: every batch runs as it is."""

    def in_one_run(self, work: Callable[[], Result]) -> Result:
        """Do work, and register its runs of graphs as one."""
        return in_one_run(self._graphs.step.settings.runs, work)

    def sample(self, trajectories: Sequence[Trajectory], outputs: Sequence[Output]) -> bool:
        """Return False: step by step, a call can be ended between two steps."""
        return False

    def start(self, trajectory: Trajectory) -> None:
        """Implement ``Engine.start``."""
        start, call = perf_counter(), trajectory.call
        x = self._noise(call.seeds, 0, self._initial_scale) if call.latents is None else call.latents * self._initial_scale
        trajectory.state = _HostState(x, x)
        trajectory.parts.append(TimedPart("noise", start, perf_counter()))

    def step(self, trajectories: Sequence[Trajectory]) -> None:
        """Implement ``Engine.step``."""
        start = perf_counter()
        if len(trajectories) == 1:
            inputs = self._step_inputs(trajectories[0])
        else:
            listed = [self._step_inputs(one) for one in trajectories]
            inputs = {name: np.concatenate([one[name] for one in listed]) for name in listed[0]}
        drawn = perf_counter()
        x = self._graphs.step(**inputs)
        weights = [one.call.evaluations[one.evaluations_done].weights for one in trajectories]
        if any(weights):
            base = _concatenated([one.state.base if own else one.state.x for one, own in zip(trajectories, weights, strict=True)])
            x = self._graphs.combine(x=inputs["x"], base=base, result=x, weights=weights_of(trajectories))
        finite = np.isfinite(x)
        flags = None if np.count_nonzero(finite) == x.size else finite.reshape(len(x), -1).all(axis=1)
        parts, at = (TimedPart("noise", start, drawn), TimedPart("step", drawn, perf_counter())), 0
        for one, own in zip(trajectories, weights, strict=True):
            rows = slice(at, at := at + len(one.call.seeds))
            one.state.advance(x[rows], None if flags is None else flags[rows], begins_step=own is None)
            one.parts += parts

    def read_state(self, trajectory: Trajectory) -> NDArray[np.float32]:
        """Implement ``Engine.read_state``."""
        return cast("NDArray[np.float32]", trajectory.state.x)

    def set_state(self, trajectory: Trajectory, x: NDArray[np.float32]) -> None:
        """Implement ``Engine.set_state``."""
        trajectory.state = _HostState(x, x)

    def finite_flags(self, trajectory: Trajectory) -> NDArray[np.bool_]:
        """Implement ``Engine.finite_flags``."""
        n = len(trajectory.state.x)
        return np.array([np.ones(n, np.bool_) if flags is None else flags for flags in trajectory.state.finite], np.bool_).reshape(-1, n)

    def all_finite(self, trajectory: Trajectory) -> bool:
        """Implement ``Engine.all_finite``."""
        all_finite: bool = trajectory.state.all_finite
        return all_finite

    def decode(self, trajectories: Sequence[Trajectory]) -> list[NDArray[Any]]:
        """Implement ``Engine.decode``."""
        start = perf_counter()
        decoded = self._graphs.decode(x=_concatenated([one.state.x for one in trajectories]))
        end, at, results = perf_counter(), 0, []
        for one in trajectories:
            rows = decoded[at : (at := at + len(one))]
            results.append(rows if len(trajectories) == 1 else rows.copy())  # a view would keep the images of all trajectories in memory
            one.parts.append(TimedPart("decode", start, end))
        return results

    def decode_on_device(self, trajectory: Trajectory) -> NDArray[Any]:
        """Implement ``Engine.decode_on_device`` with a NumPy array on the host."""
        return self.decode([trajectory])[0]

    def timestamp(self) -> float:
        """Return ``time.perf_counter`` in seconds."""
        return perf_counter()

    def elapsed(self, start: float, end: float) -> float:
        """Return the seconds between two timestamps."""
        return end - start

    def graphs(self) -> BundleSessions:
        """Return the open graphs."""
        return self._graphs

    def close(self) -> None:
        """Write the sessions' profiles. The sessions are freed with the last reference to them."""
        self._graphs.end_profiling()

    def _step_inputs(self, trajectory: Trajectory) -> dict[str, NDArray[Any]]:
        call, k = trajectory.call, trajectory.evaluations_done
        (t, t_next, _), n = call.evaluations[k], len(call.seeds)
        return {**call.conditioning, "x": trajectory.state.x, "t": _times(t, n), "t_next": _times(t_next, n), "noise": self._noise(call.seeds, k + 1, _ONE)}

    def _noise(self, seeds: NDArray[np.int64], draw: int, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        noise: NDArray[np.float32] = self._graphs.noise(seeds=seeds, draw=_draw_number(draw), scale=scale)
        return noise


def _times(t: float, n: int) -> NDArray[np.float32]:
    return _repeated(t, n) if n <= MAX_CACHED_LENGTH else np.full(n, t, np.float32)


# Small inputs that most calls need. They are read-only.


@lru_cache(CACHED_INPUTS)
def _repeated(t: float, n: int) -> NDArray[np.float32]:
    return _read_only(np.full(n, t, np.float32))


@lru_cache(CACHED_INPUTS)
def _draw_number(draw: int) -> NDArray[np.int64]:
    return _read_only(np.array(draw, np.int64))


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


def _concatenated(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
