"""Never a silent black picture: samples that turned into NaN or infinity are an error, a warning, or done again in fp32."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from scm_runtime.engines.engine import Engine, Trajectory
from scm_runtime.errors import InvalidArgumentError, NonFiniteError
from scm_runtime.inputs.call import Call

OnNonfinite = Literal["raise", "warn", "fp32"]
POLICIES = ("raise", "warn", "fp32")

_log = logging.getLogger("scm_runtime")


def check_policy(policy: object) -> OnNonfinite:
    """The argument as given, once it is known to be a policy."""
    if not isinstance(policy, str) or policy not in POLICIES:
        raise InvalidArgumentError(f"on_nonfinite must be 'raise', 'warn' or 'fp32', got {policy!r}")
    return cast(OnNonfinite, policy)


class Guard:
    """Looks at trajectories of one engine, and acts on what is not finite."""

    def __init__(self, engine: Engine, policy: OnNonfinite, open_fp32: Callable[[], Engine]) -> None:
        """``open_fp32`` opens an engine over the bundle's fp32 graphs on the same device; it is called once, when it is first needed."""
        self._engine, self._policy, self._open = engine, policy, open_fp32
        self._lock = threading.Lock()
        self._fp32: Engine | None = None

    def check(self, trajectory: Trajectory) -> None:
        """Look at the steps done since the last look at a state that was replaced; within a job of the engine.

        Raises:
            NonFiniteError: by "raise"; and by "fp32" where the graphs are fp32 already, or fp32 does not help.
        """
        finite = self._engine.finite(trajectory)
        if finite.all():
            return
        bad, step = _first_bad(finite, trajectory.k)
        message = _message(trajectory, bad, step, self._engine.dtype)
        if self._policy == "warn":
            _log.warning("%s", message)
            # Said once: what comes after the step is no news.
            self._engine.replace(trajectory, self._engine.fetch(trajectory))
            return
        if self._policy == "raise" or self._engine.dtype == "fp32":
            raise _error(trajectory, bad, step, self._engine.dtype, message)
        _log.info("%s Done again in fp32.", message)
        again = self._steps_in_fp32(trajectory, bad)
        x = np.array(self._engine.fetch(trajectory))
        x[bad] = again
        self._engine.replace(trajectory, x)

    def check_pixels(self, trajectory: Trajectory, pixels: NDArray[Any]) -> NDArray[Any]:
        """Pixels of a trajectory as decoded in the engine's dtype, with those done again that its decoder may have lost.

        Where a decoder's half precision overflows, all of a picture is NaN, and NaN becomes 0. So a picture of nothing but 0 is decoded in fp32 too: if
        that shows the same, it is a black picture; if not, it was no number.
        """
        engine = self._engine
        if engine.dtype == "fp32" or pixels.dtype != np.uint8:
            return pixels
        black: NDArray[np.bool_] = np.array(~pixels.reshape(len(pixels), -1).any(axis=1))
        if not black.any():
            return pixels
        subset = _subset(trajectory, black)
        subset.k = trajectory.k
        x = engine.fetch(trajectory)[black]
        if not np.isfinite(x).all():
            return pixels  # said already
        other = self._open_once()

        def decode() -> NDArray[Any]:
            other.begin(subset)
            other.replace(subset, x)
            return other.decode([subset])[0]

        again = other.run(decode)
        if not again.any():
            return pixels
        lost = black.copy()
        lost[black] = again.reshape(len(again), -1).any(axis=1)
        message = f"the decoder's {engine.dtype} made black pictures of samples that are none, seeds {_listed(trajectory, lost)}."
        if self._policy == "raise":
            step = len(trajectory.call.evaluations) - 1
            raise _error(trajectory, lost, step, engine.dtype, f"{message} Decode them in fp32: on_nonfinite='fp32', or dtype='fp32' throughout.")
        if self._policy == "warn":
            _log.warning("%s", message)
            return pixels
        _log.info("%s Done again in fp32.", message)
        mended = np.array(pixels)
        mended[black] = again
        return mended

    def close(self) -> None:
        """Give the fp32 engine back, where one was opened."""
        if self._fp32 is not None:
            self._fp32.close()

    def _open_once(self) -> Engine:
        with self._lock:
            if self._fp32 is None:
                self._fp32 = self._open()
            return self._fp32

    def _steps_in_fp32(self, trajectory: Trajectory, bad: NDArray[np.bool_]) -> NDArray[np.float32]:
        """The states of some samples, computed again from where they follow by steps alone."""
        engine, again = self._open_once(), _subset(trajectory, bad)

        def compute() -> NDArray[np.float32]:
            engine.begin(again)
            again.k, x = trajectory.origin
            if x is not None:
                engine.replace(again, x[bad])
            while again.k < trajectory.k:
                engine.advance([again])
                again.k += 1
            finite = engine.finite(again)
            if not finite.all():
                still, step = _first_bad(finite, again.k)
                raise _error(again, still, step, "fp32", _message(again, still, step, "fp32"))
            return engine.fetch(again)

        return engine.run(compute)


def _first_bad(finite: NDArray[np.bool_], k: int) -> tuple[NDArray[np.bool_], int]:
    """Which samples were not finite, of ``[m, n]`` after the last m of k steps, and after which step, from 0, that began."""
    return np.array(~finite.all(axis=0)), k - len(finite) + int(np.flatnonzero(~finite.all(axis=1))[0])


def _subset(trajectory: Trajectory, rows: NDArray[np.bool_]) -> Trajectory:
    call = trajectory.call
    conditioning = {name: value[rows] for name, value in call.conditioning.items()}
    return Trajectory(replace(call, seeds=call.seeds[rows], conditioning=conditioning, latents=None if call.latents is None else call.latents[rows]))


def _listed(trajectory: Trajectory, rows: NDArray[np.bool_]) -> str:
    seeds = trajectory.call.seeds[rows].tolist()
    return ", ".join(map(str, seeds[:8])) + (", …" if len(seeds) > 8 else "")


def _message(trajectory: Trajectory, rows: NDArray[np.bool_], step: int, dtype: str) -> str:
    call: Call = trajectory.call
    message = (
        f"{int(rows.sum())} of {len(rows)} samples are not finite after step {step + 1} of {len(call.evaluations)} (t = {call.evaluations[step].t:.6g}) "
        f"in {dtype}, seeds {_listed(trajectory, rows)}."
    )
    if dtype != "fp32":
        return f"{message} Half precision overflows where fp32 need not: on_nonfinite='fp32' does such samples again in it, dtype='fp32' all."
    return f"{message} The same happens in PyTorch if the weights are at fault: check the checkpoint, the conditioning's range and the guidance scale."


def _error(trajectory: Trajectory, rows: NDArray[np.bool_], step: int, dtype: str, message: str) -> NonFiniteError:
    return NonFiniteError(message, seeds=tuple(trajectory.call.seeds[rows].tolist()), step=step, dtype=dtype)
