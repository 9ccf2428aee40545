"""The engine whose states are NumPy arrays."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.manifest import Dtype
from scm_runtime.common.interruptible import run_interruptibly
from scm_runtime.engines.engine import Output, TimedPart, Trajectory, combines, weights_of
from scm_runtime.engines.sessions import BundleSessions

Result = TypeVar("Result")

_ONE = np.array(1, np.float32)


@dataclass(slots=True)
class _HostState:
    x: NDArray[np.float32]  #               [n, *sample]
    base: NDArray[np.float32]  #            x at the beginning of the step
    finite: list[NDArray[np.bool_]]  #      [n] per evaluation


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

    def run(self, job: Callable[[], Result]) -> Result:
        """Run a job on the caller's thread, or for the main thread on another, so that signals are handled meanwhile."""
        return run_interruptibly(job)

    def keep_batch_size(self, batch_size: int) -> None:
        """Do nothing: every batch runs as it is."""

    def sample(self, trajectories: Sequence[Trajectory], outputs: Sequence[Output]) -> bool:
        """Return False: step by step, a call can be ended between two steps."""
        return False

    def start(self, trajectory: Trajectory) -> None:
        """Implement ``Engine.start``."""
        start, call = self.timestamp(), trajectory.call
        x = self._noise(call.seeds, 0, self._initial_scale) if call.latents is None else call.latents * self._initial_scale
        trajectory.state = _HostState(x, x, [])
        trajectory.parts.append(TimedPart("noise", start, self.timestamp()))

    def step(self, trajectories: Sequence[Trajectory]) -> None:
        """Implement ``Engine.step``."""
        start = self.timestamp()
        noise = _concatenated([self._noise(one.call.seeds, one.evaluations_done + 1, _ONE) for one in trajectories])
        noise_end = self.timestamp()
        inputs = [{**one.call.conditioning, "x": one.state.x, **_times(one)} for one in trajectories]
        batch = inputs[0] if len(inputs) == 1 else {name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]}
        x = self._graphs.step(noise=noise, **batch)
        if combines(trajectories):
            base = _concatenated([one.state.base if one.evaluation.weights else one.state.x for one in trajectories])
            x = self._graphs.combine(x=batch["x"], base=base, result=x, weights=weights_of(trajectories))
        finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
        parts, at = (TimedPart("noise", start, noise_end), TimedPart("step", noise_end, self.timestamp())), 0
        for one in trajectories:
            rows = slice(at, at := at + len(one))
            before, one.state.x = one.state.x, x[rows]
            if one.evaluation.weights is None:
                one.state.base = before
            one.state.finite.append(finite[rows])
            one.parts += parts

    def read_state(self, trajectory: Trajectory) -> NDArray[np.float32]:
        """Implement ``Engine.read_state``."""
        return cast("NDArray[np.float32]", trajectory.state.x)

    def set_state(self, trajectory: Trajectory, x: NDArray[np.float32]) -> None:
        """Implement ``Engine.set_state``."""
        trajectory.state = _HostState(x, x, [])

    def finite_flags(self, trajectory: Trajectory) -> NDArray[np.bool_]:
        """Implement ``Engine.finite_flags``."""
        return np.array(trajectory.state.finite, np.bool_).reshape(-1, len(trajectory.state.x))

    def decode(self, trajectories: Sequence[Trajectory]) -> list[NDArray[Any]]:
        """Implement ``Engine.decode``."""
        start = self.timestamp()
        decoded = self._graphs.decode(x=_concatenated([one.state.x for one in trajectories]))
        end, at, results = self.timestamp(), 0, []
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
        return time.perf_counter()

    def elapsed(self, start: float, end: float) -> float:
        """Return the seconds between two timestamps."""
        return end - start

    def graphs(self) -> BundleSessions:
        """Return the open graphs."""
        return self._graphs

    def close(self) -> None:
        """Write the sessions' profiles. The sessions are freed with the last reference to them."""
        self._graphs.end_profiling()

    def _noise(self, seeds: NDArray[np.int64], draw: int, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        return cast("NDArray[np.float32]", self._graphs.noise(seeds=seeds, draw=np.array(draw, np.int64), scale=scale))


def _times(trajectory: Trajectory) -> dict[str, NDArray[np.float32]]:
    t, t_next, _ = trajectory.evaluation
    return {"t": np.full(len(trajectory), t, np.float32), "t_next": np.full(len(trajectory), t_next, np.float32)}


def _concatenated(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
