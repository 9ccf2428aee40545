"""Does the bundle compute what the checkpoint computes? Its graphs against the references, through the runtime's own sessions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scm_export.bf16 import emulated
from scm_export.references import BATCH_SIZES, LARGE_NETWORK, Drawn, Evaluated, Mapped, References, Way, describe, describe_steps
from scm_export.tolerances import PIXEL_ATOL, min_psnr, passes, sample_atol
from scm_runtime.bundle import COMBINE, Dtype, Manifest, Verification, VerifiedCase
from scm_runtime.errors import ExportError, InferenceError, VerificationError
from scm_runtime.schedules import Evaluations, Schedules
from scm_runtime.session import Session, Settings

DEVICES = ("cpu",)  # every one that sessions can be opened on

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Compared:
    """Samples of the reference and the bundle's, as pixels uint8 ``[N, H, W, C]`` or latents float32 ``[N, C, ...]``."""

    title: str
    expected: NDArray[Any]
    found: NDArray[Any]


@dataclass
class Outcome:
    """What a comparison showed, good or bad."""

    reference: str
    cases: list[VerifiedCase] = field(default_factory=list)
    pictures: list[Compared] = field(default_factory=list)
    failure: str | None = None
    """Why nothing more could be compared: a graph does not run, or PyTorch's own results are not finite."""

    @property
    def verification(self) -> Verification | None:
        """For the manifest; None where nothing was compared."""
        cases = sorted(self.cases, key=lambda case: (case.device, case.dtype, case.graph != "step", case.graph))
        return Verification(reference=self.reference, device=", ".join(DEVICES), cases=tuple(cases)) if cases else None

    @property
    def passed(self) -> bool:
        """Whether everything could be compared and is within tolerance."""
        return self.failure is None and all(passes(case) for case in self.cases)

    def require_passed(self) -> None:
        """Raises VerificationError unless the bundle passed."""
        if self.failure is not None:
            raise VerificationError(self.failure, self.verification)
        if bad := [case for case in self.cases if not passes(case)]:
            worst = max(bad, key=lambda case: case.max_abs / case.atol if math.isfinite(case.max_abs) else math.inf)
            what = f"{worst.graph}.{worst.dtype} at batch {worst.batch_size}" + (f", {worst.steps} steps" if worst.steps else "")
            quality = "" if worst.min_psnr is None or worst.psnr is None else f", PSNR {worst.psnr:.1f} dB, at least {worst.min_psnr:g}"
            raise VerificationError(
                f"{len(bad)} of {len(self.cases)} cases are over tolerance; the worst is {what}: max abs error {worst.max_abs:.3g}, "
                f"tolerance {worst.atol:.3g}{quality}. No bundle was written. --report FILE.html shows the pictures, --atol sets another tolerance, "
                "--no-verify leaves the check out.",
                self.verification,
            )


def verify_bundle(folder: Path, manifest: Manifest, references: References, atol: float | None, progress: Progress) -> Outcome:
    """Draw the references' samples through the bundle's graphs, in every dtype and on every device, and compare.

    Args:
        folder: of the bundle. A stand-in for a bfloat16 graph lies there for as long as it takes to open it.
        manifest: of the bundle.
        references: of the same model.
        atol: the largest difference allowed, in the state's scale; None for the tables of ``tolerances.py``. Tolerances of pixels change in proportion,
            and no PSNR is asked for.
        progress: called with the name of each stage.
    """
    outcome = Outcome(references.name)
    if not references.finite:
        outcome.failure = "the PyTorch sampler itself gives values that are not finite: are these the trained weights?"
        return outcome
    try:
        for device in DEVICES:
            for dtype in manifest.dtypes:
                graphs = _Graphs(folder, manifest, dtype, device, references, atol, progress)
                # One session is in memory at a time.
                for count in sorted(manifest.composed_steps, reverse=True):
                    outcome.cases += _composed(graphs, count)
                singles, sampled = _step(graphs)
                outcome.cases += singles
                for case, picture in _decoded(graphs, sampled):
                    outcome.cases.append(case)
                    outcome.pictures += [] if picture is None else [picture]
                for mapped in references.mapped:
                    outcome.cases += _mapped(graphs, mapped)
    except InferenceError as error:
        outcome.failure = f"the bundle does not run: {error}"
    except ExportError as error:  # bfloat16 that cannot be emulated
        outcome.failure = f"{error}. --no-verify leaves the check out."
    return outcome


@dataclass(frozen=True)
class _Graphs:
    """The graphs of a bundle in one dtype on one device, and what is asked of them."""

    folder: Path
    manifest: Manifest
    dtype: Dtype
    device: str
    references: References
    atol: float | None
    progress: Progress

    @contextmanager
    def open(self, graph: str) -> Iterator[Session]:
        # Without the native library: what is verified is what the bundle itself holds.
        path = self.folder / f"{graph}.{self.dtype}.onnx"
        # The step of a float32 bundle is run as hosts run it, whatever its size.
        frugal = self.manifest.parameters > LARGE_NETWORK and (graph.startswith("sample-") or self.manifest.weights_dtype != "fp32")
        if self.dtype == "bf16" and self.device == "cpu":
            with emulated(path) as stand_in:
                session = Session(stand_in, Settings(frugal=frugal))
        else:
            session = Session(path, Settings(frugal=frugal))
        yield session

    def state_atol(self, expected: NDArray[np.float32]) -> float:
        """In proportion to the state's own size, where that is more than that of data: weights that were never trained can make it so."""
        if self.atol is not None:
            return self.atol
        return sample_atol(self.dtype, self.manifest.weights_dtype, max(self.references.sigma_data, float(expected.std())))

    @property
    def pixel_atol(self) -> float:
        """In levels, for pixels that a network makes."""
        dtypes = (self.dtype, self.manifest.weights_dtype)
        return PIXEL_ATOL[dtypes] * (1 if self.atol is None else self.atol / sample_atol(*dtypes, self.references.sigma_data))

    def case(
        self,
        graph: str,
        expected: NDArray[Any],
        found: NDArray[Any],
        atol: float,
        *,
        way: Way | None = None,
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
            min_psnr=None if self.atol is not None else min_psnr(self.dtype, self.manifest.weights_dtype),
        )


def _psnr(expected: NDArray[Any], found: NDArray[Any]) -> float | None:
    """In dB, the peak being 255 for pixels and else the range of what is expected; None for identical arrays, NaN for what is not finite."""
    mse = float(np.square(found.astype(np.float64) - expected).mean())
    peak = 255.0 if expected.dtype == np.uint8 else float(np.ptp(expected))
    if mse == 0:
        return None
    return 10 * math.log10(max(peak, 1e-30) ** 2 / mse) if math.isfinite(mse) else math.nan


# ----------------------------------------------------------------------------
# Whole samplers in one graph. Functions of their own: a session's memory goes when they return.


def _composed(graphs: _Graphs, count: int) -> list[VerifiedCase]:
    wanted = [(one, n) for one in graphs.references.drawn if one.sampler is None and one.steps == count for n in one.composed]
    if not wanted:
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

Sampled = tuple[Drawn, NDArray[np.float32]]


def _step(graphs: _Graphs) -> tuple[list[VerifiedCase], list[Sampled]]:
    cases, sampled = [], []
    noise = Session(graphs.folder / "noise.onnx")
    combine = Session(graphs.folder / COMBINE) if graphs.manifest.samplers else None
    schedules = Schedules(graphs.folder, graphs.manifest)
    with graphs.open("step") as step:
        for evaluated in graphs.references.evaluated:
            graphs.progress(f"verifying step.{graphs.dtype}: single evaluations")
            cases.append(_evaluation(graphs, step, evaluated))
        for drawn in graphs.references.drawn:
            for n in drawn.batch_sizes:
                graphs.progress(f"verifying step.{graphs.dtype}: {describe_steps(drawn)}, batch {n}{describe(drawn.way)}")
                evaluations = schedules.evaluations(drawn.sampler, drawn.steps, None)
                sampled.append((drawn, _sample(graphs.manifest.initial_scale, evaluations, noise, step, combine, drawn, n)))
    return cases, sampled


def _evaluation(graphs: _Graphs, step: Session, evaluated: Evaluated) -> VerifiedCase:
    times = evaluated.inputs["t"].tolist()
    return graphs.case(
        "step", evaluated.x_next, step(**evaluated.inputs), graphs.state_atol(evaluated.x_next), way=evaluated.way, times=[float(f"{t:.7g}") for t in times]
    )


def _sample(
    initial_scale: float, evaluations: Evaluations, noise: Session, step: Session, combine: Session | None, drawn: Drawn, n: int
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


def _decoded(graphs: _Graphs, sampled: Sequence[Sampled]) -> Iterator[tuple[VerifiedCase, Compared | None]]:
    with graphs.open("decode") as decode:
        for drawn, states in sampled:
            n, expected = len(states), drawn.latents[-len(states) :]
            pixels = picture = None
            if drawn.pixels is not None and len(drawn.pixels) >= n:
                pixels = (drawn.pixels[-n:], decode(x=states))
                title = f"{graphs.dtype} on {graphs.device}, {describe_steps(drawn)}{describe(drawn.way)}"
                picture = Compared(title, *pixels) if n == len(drawn.pixels) else None
            yield (
                graphs.case("step", expected, states, graphs.state_atol(expected), way=drawn.way, sampler=drawn.sampler, steps=drawn.steps, pixels=pixels),
                picture,
            )


def _mapped(graphs: _Graphs, mapped: Mapped) -> list[VerifiedCase]:
    atol = graphs.pixel_atol if mapped.expected.dtype == np.uint8 else graphs.state_atol(mapped.expected)
    with graphs.open(mapped.graph) as session:
        cases = []
        for n in (n for n in BATCH_SIZES if n <= len(mapped.given)):
            graphs.progress(f"verifying {mapped.graph}.{graphs.dtype}: batch {n}")
            cases.append(graphs.case(mapped.graph, mapped.expected[-n:], session(**{mapped.input: mapped.given[-n:]}), atol))
        return cases
