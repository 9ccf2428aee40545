"""Samplers as tables of solver stages: the evaluations of the step graph that make up each step, and the weights that combine their results.

A consistency model has one sampler, and each of its steps is one evaluation, from one time to the next. Solvers of a diffusion model's ODE also evaluate the
step graph between two times. A table describes any solver whose next state is a weighted sum of the step's first state, the current state and the result:

    base = state at the beginning of the step, x = current state
    result = step(x, t, t_next, …)
    x = weights[0] * base + weights[1] * x + weights[2] * result

A stage without weights begins a step: x becomes the base, and the result becomes the next state. The exporter computes the numbers, so that the runtime needs
no solver's mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

from scm_runtime.bundle.manifest import MAX_FLOAT32, SAMPLERS, Manifest
from scm_runtime.common.checks import is_int
from scm_runtime.common.documents import read_json
from scm_runtime.common.message_text import first_line
from scm_runtime.errors import BundleSchemaError, InvalidArgumentError

DEFAULT_STEPS = 2
DIFFUSION_STEPS = 32
ROUNDING = 1e-5  # the largest time may be given back as `inspect` prints it, with six digits


class SolverStage(NamedTuple):
    """One evaluation of the step graph, and how its result is used."""

    t: float
    t_next: float
    weights: tuple[float, float, float] | None = None
    """Weights of base, current state and result; None at the beginning of a step, where the result is the next state."""


SolverStages = tuple[SolverStage, ...]


class SolverTables:
    """Samplers of one bundle."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Create the tables. ``samplers.json`` is read on first use."""
        self._path, self._manifest = folder / SAMPLERS, manifest

    def evaluations(self, sampler: str | None, steps: int | None, timesteps: Sequence[float] | None) -> SolverStages:
        """Return the stages for a call's arguments.

        Raises:
            InvalidArgumentError: the bundle does not have this sampler or number of steps, or the arguments contradict each other.
            BundleSchemaError: ``samplers.json`` does not fit the manifest.
        """
        manifest = self._manifest
        if sampler is not None and (not isinstance(sampler, str) or sampler not in (manifest.solver, *manifest.samplers)):
            if not manifest.samplers:
                raise InvalidArgumentError(
                    f"sampler must be {manifest.solver!r}, or None: {manifest.name!r} is a consistency model, which has no other sampler. Got {sampler!r}. "
                    "Others are for diffusion models: export the teacher (docs/bundle-format.md)."
                )
            raise InvalidArgumentError(f"sampler must be one of {', '.join((manifest.solver, *manifest.samplers))}, got {sampler!r}")
        if sampler is None or sampler == manifest.solver:
            if timesteps is None and (steps is None or type(steps) is int) and (known := self._known.get(steps)) is not None:
                return known
            return from_times(_times(manifest, steps, timesteps))
        if timesteps is not None:
            raise InvalidArgumentError(f"timesteps are for the sampler {manifest.solver!r}; for {sampler!r} give num_inference_steps")
        counts = manifest.samplers[sampler]
        return self._tables[sampler][_count(steps, counts, DIFFUSION_STEPS if DIFFUSION_STEPS in counts else max(counts))]

    @cached_property
    def _known(self) -> dict[int | None, SolverStages]:
        """Stages of the default sampler by number of steps, and those of the default number under None."""
        by_count: dict[int | None, SolverStages] = {int(count): from_times(times) for count, times in self._manifest.times.items()}
        return {None: from_times(_times(self._manifest, None, None)), **by_count}

    @cached_property
    def _tables(self) -> dict[str, dict[int, SolverStages]]:
        try:
            raw = msgspec.convert(read_json(self._path), dict[str, dict[str, list[SolverStage]]])
            tables = {name: {int(count): tuple(rows) for count, rows in table.items()} for name, table in raw.items()}
            if {name: sorted(table) for name, table in tables.items()} != {name: sorted(counts) for name, counts in self._manifest.samplers.items()}:
                raise ValueError("its samplers or step counts are not those of the manifest")
            for rows in (rows for table in tables.values() for rows in table.values()):
                if not rows or rows[0].weights is not None:
                    raise ValueError("a sampler must begin with an evaluation without weights")
                if any(abs(number) > MAX_FLOAT32 for row in rows for number in (row.t, row.t_next, *(row.weights or ()))):
                    raise ValueError("its numbers must be finite in float32")
        except (OSError, ValueError) as error:
            raise BundleSchemaError(f"'{self._path}' does not fit the bundle: {first_line(error)}. Export the checkpoint again.") from error
        return tables


@lru_cache(256)
def from_times(times: tuple[float, ...]) -> SolverStages:
    """Stages with one evaluation per step, from each time to the next."""
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
        bounded = all(end < t <= largest * (1 + ROUNDING) for t in times)  # NaN fails here too
        if not times or not bounded or any(a <= b for a, b in pairwise(times)):
            raise InvalidArgumentError(f"timesteps must be decreasing, above {end:g} and at most {largest:g} ({manifest.time_unit}), got {times}")
        return (*times, end)
    default = DEFAULT_STEPS if DEFAULT_STEPS in counts else counts[-1] if manifest.samplers else counts[0]
    hint = f" For others give timesteps, decreasing from {max(map(max, manifest.times.values())):.6g}."
    return manifest.times[str(_count(steps, counts, default, hint))]


def _count(steps: Any, counts: Sequence[int], default: int, hint: str = "") -> int:
    if steps is None:
        return default
    if not is_int(steps) or steps < 1:
        raise InvalidArgumentError(f"num_inference_steps must be an integer of at least 1, got {steps!r}")
    if int(steps) not in counts:
        raise InvalidArgumentError(f"num_inference_steps must be one of {sorted(counts)}, the counts this bundle has times for; got {steps}.{hint}")
    return int(cast(int, steps))
