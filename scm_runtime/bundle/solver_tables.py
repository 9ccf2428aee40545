"""Samplers as tables: which evaluations of the step graph make the steps of a sampler, and how their results are put together.

A consistency model has one sampler, a step of which is one evaluation, from a time to the next. A diffusion model's ODE is solved more exactly by
evaluating it between two times as well. All solvers whose next state is a weighted sum of the states and results at hand are rows of one kind:

    base, x: where the step began, and the state now
    result = step(x, t, t_next, …)
    x = weights[0] * base + weights[1] * x + weights[2] * result

A row without weights begins a step: it keeps x as the base, and its result is the next state. The numbers are worked out at export (``scm_export.samplers``),
so there is none of a solver's mathematics here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

from scm_runtime.bundle.manifest import SAMPLERS, Manifest
from scm_runtime.common.checks import is_int
from scm_runtime.errors import BundleSchemaError, InvalidArgumentError

DEFAULT_STEPS = 2
DIFFUSION_STEPS = 32


class SolverStage(NamedTuple):
    """One evaluation of the step graph."""

    t: float
    t_next: float
    weights: tuple[float, float, float] | None = None
    """Of base, state and result; None for the result alone, where a step begins."""


SolverStages = tuple[SolverStage, ...]


class SolverTables:
    """The samplers of one bundle."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """``samplers.json`` is read when it is first needed."""
        self._path, self._manifest = folder / SAMPLERS, manifest

    def evaluations(self, sampler: str | None, steps: int | None, timesteps: Sequence[float] | None) -> SolverStages:
        """For a call's arguments; raises InvalidArgumentError, and BundleSchemaError for a file that does not fit the manifest."""
        manifest = self._manifest
        if sampler is not None and (not isinstance(sampler, str) or sampler not in (manifest.solver, *manifest.samplers)):
            if not manifest.samplers:
                raise InvalidArgumentError(
                    f"sampler must be {manifest.solver!r}, or None: {manifest.name!r} is a consistency model, which knows no other. Got {sampler!r}. "
                    "Others are for diffusion models: export the teacher (docs/bundle-format.md)."
                )
            raise InvalidArgumentError(f"sampler must be one of {', '.join((manifest.solver, *manifest.samplers))}, got {sampler!r}")
        if sampler is None or sampler == manifest.solver:
            return from_times(_times(manifest, steps, timesteps))
        if timesteps is not None:
            raise InvalidArgumentError(f"timesteps are for the sampler {manifest.solver!r}; for {sampler!r} give num_inference_steps")
        counts = manifest.samplers[sampler]
        return self._tables[sampler][_count(steps, counts, DIFFUSION_STEPS if DIFFUSION_STEPS in counts else max(counts))]

    @cached_property
    def _tables(self) -> dict[str, dict[int, SolverStages]]:
        try:
            raw = msgspec.json.decode(self._path.read_bytes(), type=dict[str, dict[str, list[SolverStage]]])
            tables = {name: {int(count): tuple(rows) for count, rows in table.items()} for name, table in raw.items()}
            if {name: sorted(table) for name, table in tables.items()} != {name: sorted(counts) for name, counts in self._manifest.samplers.items()}:
                raise ValueError("it has other samplers or step counts than the manifest lists")
            for rows in (rows for table in tables.values() for rows in table.values()):
                if not rows or rows[0].weights is not None:
                    raise ValueError("a sampler must begin with an evaluation without weights")
                if not all(map(isfinite, (number for row in rows for number in (row.t, row.t_next, *(row.weights or ()))))):
                    raise ValueError("its numbers must be finite")
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise BundleSchemaError(f"'{self._path}' does not fit the bundle: {error}. Export the checkpoint again.") from error
        return tables


def from_times(times: Sequence[float]) -> SolverStages:
    """One evaluation a step, from each time to the next."""
    return tuple(SolverStage(t, t_next) for t, t_next in pairwise(times))


def _times(manifest: Manifest, steps: int | None, timesteps: Sequence[float] | None) -> tuple[float, ...]:
    counts = sorted(int(count) for count in manifest.times)
    end = manifest.times[str(counts[0])][-1]
    if timesteps is not None:
        if steps is not None:
            raise InvalidArgumentError("give num_inference_steps or timesteps, not both")
        try:
            times = [float(t) for t in timesteps]
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(f"timesteps must be a list of numbers, got {timesteps!r}") from error
        largest = max(t for known in manifest.times.values() for t in known)
        bounded = all(end < t <= largest * (1 + 1e-6) for t in times)  # NaN fails here too
        if not times or not bounded or any(a <= b for a, b in pairwise(times)):
            raise InvalidArgumentError(f"timesteps must be decreasing, above {end:g} and at most {largest:g} ({manifest.time_unit}), got {times}")
        return (*times, end)
    default = DEFAULT_STEPS if DEFAULT_STEPS in counts else counts[-1] if manifest.samplers else counts[0]
    more = f" For others give timesteps=[…], decreasing from {max(map(max, manifest.times.values())):.6g}."
    return manifest.times[str(_count(steps, counts, default, more))]


def _count(steps: Any, counts: Sequence[int], default: int, more: str = "") -> int:
    if steps is None:
        return default
    if not is_int(steps) or steps < 1:
        raise InvalidArgumentError(f"num_inference_steps must be an integer of at least 1, got {steps!r}")
    if int(steps) not in counts:
        raise InvalidArgumentError(f"num_inference_steps must be one of {sorted(counts)}, the counts this bundle has times for; got {steps}.{more}")
    return int(cast(int, steps))
