"""NaN and infinity never become black images silently: they raise an error, log a warning, or are computed again in fp32."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from scm_runtime.common.log import log
from scm_runtime.engines.engine import Engine, Trajectory
from scm_runtime.errors import InvalidArgumentError, NonFiniteError
from scm_runtime.inputs.call import Call
from scm_runtime.samples import listed_seeds

OnNonfinite = Literal["raise", "warn", "fp32"]
PROBES = 64  # values of an image that are looked at first
ON_NONFINITE = ("raise", "warn", "fp32")


def check_on_nonfinite(on_nonfinite: object) -> OnNonfinite:
    """Return the argument unchanged. Raises InvalidArgumentError if it is not "raise", "warn" or "fp32"."""
    if not isinstance(on_nonfinite, str) or on_nonfinite not in ON_NONFINITE:
        raise InvalidArgumentError(f"on_nonfinite must be 'raise', 'warn' or 'fp32', got {on_nonfinite!r}")
    return cast(OnNonfinite, on_nonfinite)


class NonFiniteHandler:
    """Checks the states and pixels of one engine, and handles those that are not finite."""

    def __init__(self, engine: Engine, on_nonfinite: OnNonfinite, open_fp32: Callable[[], Engine]) -> None:
        """Make a handler.

        Args:
            engine: the engine to check.
            on_nonfinite: what to do: raise an error, log a warning, or compute the samples again in fp32.
            open_fp32: opens an engine over the bundle's fp32 graphs on the same device. It is called once, when it is first needed.
        """
        self._engine, self._on_nonfinite, self._open_fp32 = engine, on_nonfinite, open_fp32
        self._lock = threading.Lock()
        self._fp32: Engine | None = None

    def check(self, trajectory: Trajectory) -> None:
        """Check the evaluations since the state was last replaced. Call it in a job of the engine.

        Raises:
            NonFiniteError: a sample is not finite, and ``on_nonfinite`` is "raise", or it is "fp32" and the graphs are fp32 already or fp32 does not help.
        """
        if self._engine.all_finite(trajectory):
            return
        finite = self._engine.finite_flags(trajectory)
        bad, step = _first_nonfinite(finite, trajectory.evaluations_done)
        message = _message(trajectory, bad, step, self._engine.dtype)
        if self._on_nonfinite == "warn":
            log.warning("%s", message)
            # Clear the flags: the samples stay non-finite, and one warning is enough.
            self._engine.set_state(trajectory, self._engine.read_state(trajectory))
            return
        if self._on_nonfinite == "raise" or self._engine.dtype == "fp32":
            raise _error(trajectory, bad, step, self._engine.dtype, message)
        log.info("%s Computed again in fp32.", message)
        recomputed = self._recompute(trajectory, bad)
        x = np.array(self._engine.read_state(trajectory))
        x[bad] = recomputed
        self._engine.set_state(trajectory, x)

    def check_pixels(self, trajectory: Trajectory, pixels: NDArray[Any]) -> NDArray[Any]:
        """Return the pixels of a trajectory, with images replaced that the decoder lost to NaN.

        When a decoder overflows in half precision, the whole image is NaN, and NaN becomes 0. So an image of zeros is decoded again in fp32: if the result
        is the same, the image is black; if not, the decoder overflowed.
        """
        engine = self._engine
        if engine.dtype == "fp32" or pixels.dtype != np.uint8:
            return pixels
        flat = pixels.reshape(len(pixels), -1)
        if flat[:, :: max(flat.shape[1] // PROBES, 1)].any(axis=1).all():  # a few pixels show that most images are not black
            return pixels
        black: NDArray[np.bool_] = np.array(~flat.any(axis=1))
        if not black.any():
            return pixels
        subset = _subset(trajectory, black)
        subset.evaluations_done = trajectory.evaluations_done
        x = engine.read_state(trajectory)[black]
        if not np.isfinite(x).all():
            return pixels  # reported after the step
        fp32 = self._engine.run(self._open_fp32_once)

        def decode() -> NDArray[Any]:
            fp32.start(subset)
            fp32.set_state(subset, x)
            return fp32.decode([subset])[0]

        decoded = fp32.run(decode)
        if not decoded.any():
            return pixels
        lost = black.copy()
        lost[black] = decoded.reshape(len(decoded), -1).any(axis=1)
        message = f"the decoder overflowed in {engine.dtype} and made black images, seeds {_listed_seeds(trajectory, lost)}."
        if self._on_nonfinite == "raise":
            step = len(trajectory.call.evaluations) - 1
            raise _error(trajectory, lost, step, engine.dtype, f"{message} Decode them in fp32: on_nonfinite='fp32', or dtype='fp32' throughout.")
        if self._on_nonfinite == "warn":
            log.warning("%s", message)
            return pixels
        log.info("%s Computed again in fp32.", message)
        result = np.array(pixels)
        result[black] = decoded
        return result

    def close(self) -> None:
        """Close the fp32 engine if it was opened."""
        if self._fp32 is not None:
            self._fp32.close()

    def _open_fp32_once(self) -> Engine:
        with self._lock:
            if self._fp32 is None:
                self._fp32 = self._open_fp32()
            return self._fp32

    def _recompute(self, trajectory: Trajectory, bad: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Compute the states of some samples again in fp32, from the trajectory's restart point."""
        engine, subset = self._engine.run(self._open_fp32_once), _subset(trajectory, bad)

        def compute() -> NDArray[np.float32]:
            engine.start(subset)
            subset.evaluations_done, x = trajectory.restart_point
            if x is not None:
                engine.set_state(subset, x[bad])
            while subset.evaluations_done < trajectory.evaluations_done:
                engine.step([subset])
                subset.evaluations_done += 1
            if not engine.all_finite(subset):
                finite = engine.finite_flags(subset)
                still_bad, step = _first_nonfinite(finite, subset.evaluations_done)
                raise _error(subset, still_bad, step, "fp32", _message(subset, still_bad, step, "fp32"))
            return engine.read_state(subset)

        return engine.run(compute)


def _first_nonfinite(finite: NDArray[np.bool_], evaluations_done: int) -> tuple[NDArray[np.bool_], int]:
    """Return a mask of the samples that were not finite, and the index of the first evaluation after which one was not.

    ``finite`` has the flags ``[m, n]`` after the last m of ``evaluations_done`` evaluations.
    """
    return np.array(~finite.all(axis=0)), evaluations_done - len(finite) + int(np.flatnonzero(~finite.all(axis=1))[0])


def _subset(trajectory: Trajectory, rows: NDArray[np.bool_]) -> Trajectory:
    call = trajectory.call
    conditioning = {name: value[rows] for name, value in call.conditioning.items()}
    return Trajectory(replace(call, seeds=call.seeds[rows], conditioning=conditioning, latents=None if call.latents is None else call.latents[rows]))


def _listed_seeds(trajectory: Trajectory, rows: NDArray[np.bool_]) -> str:
    return listed_seeds(trajectory.call.seeds[rows].tolist())


def _message(trajectory: Trajectory, rows: NDArray[np.bool_], step: int, dtype: str) -> str:
    call: Call = trajectory.call
    message = (
        f"{int(rows.sum())} of {len(rows)} samples are not finite after step {step + 1} of {len(call.evaluations)} (t = {call.evaluations[step].t:.6g}) "
        f"in {dtype}, seeds {_listed_seeds(trajectory, rows)}."
    )
    if dtype != "fp32":
        return f"{message} Half precision can overflow where fp32 does not: on_nonfinite='fp32' computes such samples again in fp32, dtype='fp32' all samples."
    return f"{message} The same happens in PyTorch if the weights are at fault: check the checkpoint, the conditioning's range and the guidance scale."


def _error(trajectory: Trajectory, rows: NDArray[np.bool_], step: int, dtype: str, message: str) -> NonFiniteError:
    return NonFiniteError(message, seeds=tuple(trajectory.call.seeds[rows].tolist()), step=step, dtype=dtype)
