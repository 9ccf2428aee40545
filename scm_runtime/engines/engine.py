"""What computes: an engine keeps states on its device and takes them a step further. The host's engine, of NumPy arrays, stands here.

A call becomes a ``Trajectory``. An engine advances several of them in one evaluation, also such as stand at different steps: time is an input a
sample, and noise follows from each sample's own seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle.manifest import Dtype
from scm_runtime.bundle.solver_tables import SolverStage
from scm_runtime.engines.sessions import Graphs
from scm_runtime.inputs.call import Call

Result = TypeVar("Result")
PartName = Literal["noise", "step", "decode", "copy"]


class Part(NamedTuple):
    """A piece of a call's work between two marks of its engine's clock."""

    name: PartName
    start: Any
    end: Any


@dataclass(eq=False)
class Trajectory:
    """The samples of one call on their way from noise to data."""

    call: Call
    k: int = 0
    """Evaluations done."""
    state: Any = None
    """The engine's own."""
    origin: tuple[int, NDArray[np.float32] | None] = (0, None)
    """From where the state follows by evaluations alone: after so many of them, the noise (None) or what a callback put in its place."""
    parts: list[Part] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether no evaluation is left."""
        return self.k == len(self.call.evaluations)

    @property
    def evaluation(self) -> SolverStage:
        """The next one."""
        return self.call.evaluations[self.k]

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.call.seeds)


class Engine(Protocol):
    """Computes for one Generator in one dtype. All methods but ``run`` are to be called from within a job of ``run``."""

    @property
    def dtype(self) -> Dtype: ...

    @property
    def provider(self) -> str:
        """ONNX Runtime's name of what runs the step graph."""

    @property
    def cuda_graph(self) -> bool:
        """Whether runs of the step graph are captured."""

    @property
    def lazy(self) -> bool:
        """Whether work is only queued until something is fetched: then looking at a state costs more than computing it."""

    def run(self, job: Callable[[], Result]) -> Result:
        """Run a job in the thread that the engine needs, and return what it returns."""

    def begin(self, trajectory: Trajectory) -> None:
        """Its first state: initial_scale times its latents, or noise of draw 0."""

    def advance(self, trajectories: Sequence[Trajectory]) -> None:
        """Each one's next evaluation, with noise of draw k + 1, all at once. Leaves ``k`` alone.

        Their conditioning must have the same free sizes.
        """

    def fetch(self, trajectory: Trajectory) -> NDArray[np.float32]:
        """The state on the host, ``[n, *sample]``."""

    def replace(self, trajectory: Trajectory, x: NDArray[np.float32]) -> None:
        """Put another state, finite, in its place."""

    def finite(self, trajectory: Trajectory) -> NDArray[np.bool_]:
        """``[m, n]``: of each sample after each of the last m evaluations, those since ``begin`` or ``replace``."""

    def decode(self, trajectories: Sequence[Trajectory]) -> list[NDArray[Any]]:
        """What the bundle's decode graph makes of each one's state, on the host."""

    def on_device(self, trajectory: Trajectory) -> Any:
        """What ``decode`` gives, left on the device: something with ``shape``, ``dtype`` and ``__dlpack__`` that is the caller's own."""

    def mark(self) -> Any:
        """Now, on the engine's clock."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks, once what lies between them is done."""

    def graphs(self) -> Graphs:
        """The sessions, for graphs outside the loop."""

    def close(self) -> None:
        """Give memory and threads back. No job runs then or comes after."""


_ONE = np.array(1, np.float32)
RESULT = (0.0, 0.0, 1.0)  # weights that leave an evaluation's result as it is


@dataclass(slots=True)
class _HostState:
    x: NDArray[np.float32]  #               [n, *sample]
    base: NDArray[np.float32]  #            the same, where the step began
    finite: list[NDArray[np.bool_]]  #      [n] an evaluation


class HostEngine:
    """States are NumPy arrays; ONNX Runtime copies them where a provider needs them. Any number of threads may use it."""

    lazy = False
    cuda_graph = False

    def __init__(self, graphs: Graphs, dtype: Dtype, initial_scale: float) -> None:
        """Compute with open graphs; ``initial_scale`` is the manifest's."""
        self.dtype: Dtype = dtype
        self.provider = graphs.step.provider
        self._graphs, self._initial_scale = graphs, np.array(initial_scale, np.float32)

    def run(self, job: Callable[[], Result]) -> Result:
        """At once, in the caller's thread."""
        return job()

    def begin(self, trajectory: Trajectory) -> None:
        """See Engine."""
        start, call = self.mark(), trajectory.call
        x = self._noise(call.seeds, 0, self._initial_scale) if call.latents is None else call.latents * self._initial_scale
        trajectory.state = _HostState(x, x, [])
        trajectory.parts.append(Part("noise", start, self.mark()))

    def advance(self, trajectories: Sequence[Trajectory]) -> None:
        """See Engine."""
        start = self.mark()
        noise = _joined([self._noise(one.call.seeds, one.k + 1, _ONE) for one in trajectories])
        drawn = self.mark()
        inputs = [{**one.call.conditioning, "x": one.state.x, **_times(one)} for one in trajectories]
        joined = inputs[0] if len(inputs) == 1 else {name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]}
        x = self._graphs.step(noise=noise, **joined)
        if combines(trajectories):
            base = _joined([one.state.base if one.evaluation.weights else one.state.x for one in trajectories])
            x = self._graphs.combine(x=joined["x"], base=base, result=x, weights=weights_of(trajectories))
        finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
        step, at = (Part("noise", start, drawn), Part("step", drawn, self.mark())), 0
        for one in trajectories:
            rows = slice(at, at := at + len(one))
            before, one.state.x = one.state.x, x[rows]
            if one.evaluation.weights is None:
                one.state.base = before
            one.state.finite.append(finite[rows])
            one.parts += step

    def fetch(self, trajectory: Trajectory) -> NDArray[np.float32]:
        """See Engine."""
        return cast("NDArray[np.float32]", trajectory.state.x)

    def replace(self, trajectory: Trajectory, x: NDArray[np.float32]) -> None:
        """See Engine."""
        trajectory.state = _HostState(x, x, [])

    def finite(self, trajectory: Trajectory) -> NDArray[np.bool_]:
        """See Engine."""
        return np.array(trajectory.state.finite, np.bool_).reshape(-1, len(trajectory.state.x))

    def decode(self, trajectories: Sequence[Trajectory]) -> list[NDArray[Any]]:
        """See Engine."""
        start = self.mark()
        decoded = self._graphs.decode(x=_joined([one.state.x for one in trajectories]))
        end, at, parts = self.mark(), 0, []
        for one in trajectories:
            own = decoded[at : (at := at + len(one))]
            parts.append(own if len(trajectories) == 1 else own.copy())  # or each would keep the pixels of all alive
            one.parts.append(Part("decode", start, end))
        return parts

    def on_device(self, trajectory: Trajectory) -> NDArray[Any]:
        """See Engine: on the host, a NumPy array."""
        return self.decode([trajectory])[0]

    def mark(self) -> float:
        """Seconds of the process's clock."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """See Engine."""
        return end - start

    def graphs(self) -> Graphs:
        """See Engine."""
        return self._graphs

    def close(self) -> None:
        """See Engine: the sessions go with the last reference to them."""
        self._graphs.end_profiling()

    def _noise(self, seeds: NDArray[np.int64], draw: int, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        return cast("NDArray[np.float32]", self._graphs.noise(seeds=seeds, draw=np.array(draw, np.int64), scale=scale))


def combines(trajectories: Sequence[Trajectory]) -> bool:
    """Whether the next evaluation of one of them is put together with its states."""
    return any(one.evaluation.weights is not None for one in trajectories)


def weights_of(trajectories: Sequence[Trajectory]) -> NDArray[np.float32]:
    """The input ``weights`` of the combine graph, ``[N, 3]``."""
    return np.repeat(np.array([one.evaluation.weights or RESULT for one in trajectories], np.float32), [len(one) for one in trajectories], 0)


def _times(trajectory: Trajectory) -> dict[str, NDArray[np.float32]]:
    t, t_next, _ = trajectory.evaluation
    return {"t": np.full(len(trajectory), t, np.float32), "t_next": np.full(len(trajectory), t_next, np.float32)}


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
