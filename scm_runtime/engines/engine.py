"""The interface of an engine, which keeps the states of trajectories on its device and evaluates the step graph on them.

A call becomes a ``Trajectory``. An engine can evaluate several of them in one batch, also at different steps: the time is an input per sample, and the noise
of a sample depends only on its seed. ``host.HostEngine`` and ``cuda.engine.CudaEngine`` implement the interface.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.manifest import Dtype
from scm_runtime.bundle.solver_tables import SolverStage
from scm_runtime.engines.sessions import BundleSessions
from scm_runtime.inputs.call import Call

Result = TypeVar("Result")
PartName = Literal["noise", "step", "decode", "copy"]
Output = Literal["pixels", "state", "device"]
"""What is wanted of a trajectory: the decoder's output on the host, the last state, or the decoder's output on the device."""

IDENTITY_WEIGHTS = (0.0, 0.0, 1.0)  # of base, state and result: the next state is the result


class TimedPart(NamedTuple):
    """A part of a call's work, between two timestamps of the engine."""

    name: PartName
    start: Any
    end: Any


@dataclass(eq=False)
class Trajectory:
    """The samples of one call on their way from noise to data."""

    call: Call
    evaluations_done: int = 0
    """Number of evaluations of the step graph so far."""
    state: Any = None
    """State of the samples, in a form private to the engine."""
    restart_point: tuple[int, NDArray[np.float32] | None] = (0, None)
    """Number of evaluations done, and the state at that point, from which the current state can be recomputed. A state of None is the initial noise."""
    parts: list[TimedPart] = field(default_factory=list)
    """Timed parts of the work so far."""

    @property
    def done(self) -> bool:
        """True if no evaluation is left."""
        return self.evaluations_done == len(self.call.evaluations)

    @property
    def evaluation(self) -> SolverStage:
        """The next evaluation."""
        return self.call.evaluations[self.evaluations_done]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.call.seeds)


class Engine(Protocol):
    """Computes for one Generator in one dtype. All methods but ``run`` and ``close`` must be called from a job of ``run``."""

    @property
    def dtype(self) -> Dtype:
        """Precision of the step and decode graphs."""

    @property
    def provider(self) -> str:
        """ONNX Runtime's name of the execution provider of the step graph."""

    @property
    def cuda_graph(self) -> bool:
        """True if runs of the step graph are captured as CUDA graphs, and none of their captures has failed."""

    @property
    def asynchronous(self) -> bool:
        """True if work is queued on a device. Reading a state then waits for the device, and costs more than computing it."""

    @property
    def captured_batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes of which runs were captured as CUDA graphs, in increasing order."""

    def keep_batch_size(self, batch_size: int) -> None:
        """Run batches of this size as they are, if the engine pads others."""

    def run(self, job: Callable[[], Result], *, brief: bool = False) -> Result:
        """Run a job on the thread that the engine needs, and return its result. ``brief`` says that it takes at most a few milliseconds."""

    def in_one_run(self, work: Callable[[], Result]) -> Result:
        """Do the work of one call in a job, and return its result. Its runs of graphs are registered together if that saves time."""

    def sample(self, trajectories: Sequence[Trajectory], outputs: Sequence[Output]) -> bool:
        """Compute trajectories that were not started to their outputs at once, if the engine can do that better than step by step.

        Returns:
            True if all evaluations are done: ``evaluations_done`` is left unchanged, and the methods below return the results. False if nothing was done.
        """

    def start(self, trajectory: Trajectory) -> None:
        """Set the first state: ``initial_scale`` times the call's latents, or times noise of draw 0."""

    def step(self, trajectories: Sequence[Trajectory]) -> None:
        """Evaluate the step graph once for all trajectories, with noise of draw ``evaluations_done + 1``. Leaves ``evaluations_done`` unchanged.

        The conditioning of the trajectories must have the same dynamic sizes.
        """

    def read_state(self, trajectory: Trajectory) -> NDArray[np.float32]:
        """Return the state ``[n, *sample]`` on the host."""

    def set_state(self, trajectory: Trajectory, x: NDArray[np.float32]) -> None:
        """Replace the state by finite values ``[n, *sample]``."""

    def finite_flags(self, trajectory: Trajectory) -> NDArray[np.bool_]:
        """Return flags ``[m, n]``: True if a sample was finite after an evaluation, for the m evaluations since ``start`` or ``set_state``."""

    def all_finite(self, trajectory: Trajectory) -> bool:
        """Return True if all of ``finite_flags`` are True."""

    def decode(self, trajectories: Sequence[Trajectory]) -> list[NDArray[Any]]:
        """Run the decode graph on all states in one batch, and return the result for each trajectory on the host."""

    def decode_on_device(self, trajectory: Trajectory) -> Any:
        """Run the decode graph, and return its result on the device: an array with ``shape``, ``dtype`` and ``__dlpack__`` that the caller owns."""

    def timestamp(self) -> Any:
        """Return a timestamp of the engine's clock."""

    def elapsed(self, start: Any, end: Any) -> float:
        """Return the seconds between two timestamps, once the work between them is done."""

    def graphs(self) -> BundleSessions:
        """Return the open graphs, to run those outside the sampling loop."""

    def close(self) -> None:
        """Free memory and threads. No job may run at the same time or later."""


def combines(trajectories: Sequence[Trajectory]) -> bool:
    """Return True if the next evaluation of any trajectory is combined with its earlier states by the combine graph."""
    return any(one.evaluation.weights is not None for one in trajectories)


def weights_of(trajectories: Sequence[Trajectory]) -> NDArray[np.float32]:
    """Return the input ``weights`` of the combine graph, ``[N, 3]``."""
    return np.repeat(np.array([one.evaluation.weights or IDENTITY_WEIGHTS for one in trajectories], np.float32), [len(one) for one in trajectories], 0)
