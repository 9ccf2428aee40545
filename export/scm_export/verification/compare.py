"""A bundle's graphs against the references, through the runtime's own sessions: in one dtype, on one device, with the native library or without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scm_export.errors import ExportError
from scm_export.verification.bf16_emulation import emulated
from scm_export.verification.references import (
    BATCH_SIZES,
    LARGE_NETWORK,
    ConditioningCase,
    ReferenceMapping,
    References,
    ReferenceSamples,
    ReferenceStep,
    describe,
    describe_steps,
)
from scm_export.verification.tolerances import PIXEL_ATOL, min_psnr, sample_atol
from scm_runtime.bundle.manifest import COMBINE, Dtype, Manifest, VerifiedCase
from scm_runtime.bundle.solver_tables import Evaluations, Schedules
from scm_runtime.errors import InferenceError
from scm_runtime.ort.open_session import open_session
from scm_runtime.ort.options import SessionSettings
from scm_runtime.ort.session import Session

Progress = Callable[[str], None]


REPEATS = 2  # of the samples of a single evaluation


@dataclass(frozen=True)
class ImagePair:
    """Samples of the reference and the bundle's, as pixels uint8 ``[N, H, W, C]`` or latents float32 ``[N, C, ...]``."""

    title: str
    expected: NDArray[Any]
    found: NDArray[Any]


@dataclass(frozen=True)
class Graphs:
    """The graphs of a bundle in one dtype on one device, and what is asked of them."""

    folder: Path
    manifest: Manifest
    dtype: Dtype
    device: str
    references: References
    atol: float | None
    progress: Progress
    library: Path | None = None
    """Of native kernels, which take the place of the function bodies; None: what is compared is what the bundle itself holds."""

    @contextmanager
    def open(self, graph: str) -> Iterator[Session]:
        path = self.folder / f"{graph}.{self.dtype}.onnx"
        # The step of a float32 bundle is run as hosts run it, whatever its size.
        as_hosts = not graph.startswith("sample-") and self.manifest.weights_dtype == "fp32" and self.library is None
        settings = SessionSettings(low_memory=self.manifest.parameters > LARGE_NETWORK and not as_hosts, library=self.library)
        if self.dtype == "bf16" and self.device == "cpu":
            with emulated(path) as stand_in:
                session = open_session(stand_in, settings)
        else:
            session = open_session(path, settings)
        yield session

    def open_shared(self, name: str) -> Session:
        """A graph that all dtypes share, by its file's name."""
        return open_session(self.folder / name, SessionSettings(library=self.library))

    @property
    def dtypes(self) -> tuple[Dtype, str]:
        """In which tolerances are given: what a graph computes in and what its weights are stored in.

        Kernels for a processor's matrix units take float32 for the sum of two bfloat16: more than float16 has, and less than float32.
        """
        stored = self.manifest.weights_dtype
        return self.dtype, "fp16" if self.library is not None and stored == "fp32" else stored

    def state_atol(self, expected: NDArray[np.float32]) -> float:
        """In proportion to the state's own size, where that is more than that of data: weights that were never trained can make it so."""
        if self.atol is not None:
            return self.atol
        return sample_atol(*self.dtypes, max(self.references.sigma_data, float(expected.std())))

    @property
    def pixel_atol(self) -> float:
        """In levels, for pixels that a network makes."""
        return PIXEL_ATOL[self.dtypes] * (1 if self.atol is None else self.atol / sample_atol(*self.dtypes, self.references.sigma_data))

    def case(
        self,
        graph: str,
        expected: NDArray[Any],
        found: NDArray[Any],
        atol: float,
        *,
        way: ConditioningCase | None = None,
        sampler: str | None = None,
        steps: int = 0,
        times: Sequence[float] = (),
        unit: float = 1.0,
        pixels: tuple[NDArray[Any], NDArray[Any]] | None = None,
    ) -> VerifiedCase:
        """Compare; ``unit`` is what a difference of 1 is in the scale of ``atol``, ``pixels`` are (expected, found) for the PSNR, where there are any."""
        difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)) * unit
        return VerifiedCase(
            graph=graph,
            dtype=self.dtype,
            device=self.device,
            batch_size=len(found),
            sampler=sampler,
            steps=steps,
            times=tuple(times),
            guidance_scale=None if way is None else way.guidance_scale,
            sizes={} if way is None else way.sizes,
            max_abs=float(difference.max()),
            mean_abs=float(difference.mean()),
            atol=atol,
            psnr=_psnr(*(pixels or (expected, found))),
            min_psnr=None if self.atol is not None else min_psnr(*self.dtypes),
        )


def _psnr(expected: NDArray[Any], found: NDArray[Any]) -> float | None:
    """In dB, the peak being 255 for pixels and else the range of what is expected; None for identical arrays, NaN for what is not finite."""
    mse = float(np.square(found.astype(np.float64) - expected).mean())
    peak = 255.0 if expected.dtype == np.uint8 else float(np.ptp(expected))
    if mse == 0:
        return None
    return 10 * math.log10(max(peak, 1e-30) ** 2 / mse) if math.isfinite(mse) else math.nan


def compare(graphs: Graphs) -> Iterator[tuple[VerifiedCase, ImagePair | None]]:
    """All cases of the references, one session in memory at a time; pictures of those that make any.

    Raises:
        InferenceError: a graph does not open or does not run.
        NativeOpsError: ONNX Runtime refuses the library.
    """
    for count in sorted(graphs.manifest.composed_steps, reverse=True):
        yield from ((case, None) for case in _composed(graphs, count))
    singles, sampled = _step(graphs)
    yield from ((case, None) for case in singles)
    yield from _decoded(graphs, sampled)
    for mapped in graphs.references.mapped:
        yield from ((case, None) for case in _mapped(graphs, mapped))


# ----------------------------------------------------------------------------
# Whole samplers in one graph. Functions of their own: a session's memory goes when they return.


def _composed(graphs: Graphs, count: int) -> list[VerifiedCase]:
    wanted = [(one, n) for one in graphs.references.drawn if one.sampler is None and one.steps == count for n in one.composed]
    if not wanted and graphs.library is None:  # with it, a graph that no sample is drawn from is still opened
        return []
    cases, level = [], graphs.references.level
    with graphs.open(f"sample-{count}") as session:
        for drawn, n in wanted:
            graphs.progress(f"verifying sample-{count}.{graphs.dtype}: batch {n}{describe(drawn.way)}")
            assert drawn.pixels is not None
            found = session(seeds=drawn.seeds[-n:], **{name: values[-n:] for name, values in drawn.conditioning.items()})
            expected = drawn.pixels[-n:]
            if expected.dtype != np.uint8:
                atol, unit = graphs.state_atol(expected), 1.0
            elif level is None:
                atol, unit = graphs.pixel_atol, 1.0
            else:  # a whole sampler returns pixels alone: their difference, in the state's scale, where rounding adds up to a level
                atol, unit = graphs.state_atol(drawn.latents) + level, level
            cases.append(graphs.case(f"sample-{count}", expected, found, atol, way=drawn.way, steps=count, unit=unit))
    return cases


# ----------------------------------------------------------------------------
# The step graph: single evaluations, and the runtime's loop.

Sampled = tuple[ReferenceSamples, NDArray[np.float32]]


def _step(graphs: Graphs) -> tuple[list[VerifiedCase], list[Sampled]]:
    cases, sampled = [], []
    noise = graphs.open_shared("noise.onnx")
    combine = graphs.open_shared(COMBINE) if graphs.manifest.samplers else None
    schedules = Schedules(graphs.folder, graphs.manifest)
    with graphs.open("step") as step:
        for evaluated in graphs.references.evaluated:
            graphs.progress(f"verifying step.{graphs.dtype}: single evaluations")
            cases.append(_evaluation(graphs, step, evaluated))
        if graphs.manifest.family == "module" and graphs.library is None:
            graphs.progress(f"verifying step.{graphs.dtype}: a larger batch")
            cases.append(_larger_batch(graphs, step, graphs.references.evaluated[0]))
        for drawn in graphs.references.drawn:
            for n in drawn.batch_sizes:
                graphs.progress(f"verifying step.{graphs.dtype}: {describe_steps(drawn)}, batch {n}{describe(drawn.way)}")
                evaluations = schedules.evaluations(drawn.sampler, drawn.steps, None)
                sampled.append((drawn, _sample(graphs.manifest.initial_scale, evaluations, noise, step, combine, drawn, n)))
    return cases, sampled


def _evaluation(graphs: Graphs, step: Session, evaluated: ReferenceStep) -> VerifiedCase:
    times = evaluated.inputs["t"].tolist()
    return graphs.case(
        "step", evaluated.x_next, step(**evaluated.inputs), graphs.state_atol(evaluated.x_next), way=evaluated.way, times=[float(f"{t:.7g}") for t in times]
    )


def _larger_batch(graphs: Graphs, step: Session, evaluated: ReferenceStep) -> VerifiedCase:
    """The same samples several times over: a batch larger than any that the network was called with in PyTorch, whose size it might have kept.

    Raises:
        ExportError: the graph fails in it.
    """
    inputs = {name: np.concatenate([values] * REPEATS) for name, values in evaluated.inputs.items()}
    repeated = replace(evaluated, inputs=inputs, x_next=np.concatenate([evaluated.x_next] * REPEATS))
    try:
        return _evaluation(graphs, step, repeated)
    except InferenceError as error:
        n = len(repeated.x_next)
        raise ExportError(
            f"the step fails for {n} samples, more than the network was called with while it was exported: {error} Where the network keeps a table of the "
            "batch's size between calls, make that table at every call"
        ) from error


def _sample(
    initial_scale: float, evaluations: Evaluations, noise: Session, step: Session, combine: Session | None, drawn: ReferenceSamples, n: int
) -> NDArray[np.float32]:
    """What Generator does, the last n samples of the reference in a batch of their own."""
    seeds, conditioning = drawn.seeds[-n:], {name: values[-n:] for name, values in drawn.conditioning.items()}

    def draw(index: int, scale: float) -> NDArray[np.float32]:
        return noise(seeds=seeds, draw=np.array(index, np.int64), scale=np.array(scale, np.float32))

    base = x = draw(0, initial_scale)
    for k, (t, t_next, weights) in enumerate(evaluations):
        moments = {name: np.full(n, value, np.float32) for name, value in {"t": t, "t_next": t_next}.items()}
        result = step(x=x, **moments, noise=draw(k + 1, 1.0), **conditioning)
        if weights is None:
            base, x = x, result
        else:
            assert combine is not None
            x = combine(x=x, base=base, result=result, weights=np.full((n, 3), weights, np.float32))
    return x


# ----------------------------------------------------------------------------
# Pixels: of the samples, where the reference has any; and the networks between latents and images alone.


def _decoded(graphs: Graphs, sampled: Sequence[Sampled]) -> Iterator[tuple[VerifiedCase, ImagePair | None]]:
    with graphs.open("decode") as decode:
        for drawn, states in sampled:
            n, expected = len(states), drawn.latents[-len(states) :]
            pixels = picture = None
            if drawn.pixels is not None and len(drawn.pixels) >= n:
                pixels = (drawn.pixels[-n:], decode(x=states))
                title = f"{graphs.dtype} on {graphs.device}, {describe_steps(drawn)}{describe(drawn.way)}"
                picture = ImagePair(title, *pixels) if n == len(drawn.pixels) else None
            yield (
                graphs.case("step", expected, states, graphs.state_atol(expected), way=drawn.way, sampler=drawn.sampler, steps=drawn.steps, pixels=pixels),
                picture,
            )


def _mapped(graphs: Graphs, mapped: ReferenceMapping) -> list[VerifiedCase]:
    atol = graphs.pixel_atol if mapped.expected.dtype == np.uint8 else graphs.state_atol(mapped.expected)
    with graphs.open(mapped.graph) as session:
        cases = []
        for n in (n for n in BATCH_SIZES if n <= len(mapped.given)):
            graphs.progress(f"verifying {mapped.graph}.{graphs.dtype}: batch {n}")
            cases.append(graphs.case(mapped.graph, mapped.expected[-n:], session(**{mapped.input: mapped.given[-n:]}), atol))
        return cases
