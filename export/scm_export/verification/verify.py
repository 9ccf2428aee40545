"""Does the bundle compute what the checkpoint computes? Its graphs against the references, on ONNX Runtime alone and with the native library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from scm_export.errors import ExportError, VerificationError
from scm_export.verification.compare import Graphs, ImagePair, Progress, compare
from scm_export.verification.references import LARGE_NETWORK, References
from scm_export.verification.tolerances import passes, sample_atol
from scm_runtime.bundle.manifest import Dtype, Manifest, Verification, VerifiedCase
from scm_runtime.errors import InferenceError, NativeOpsError
from scm_runtime.ort.native_ops import usable_on_cpu

DEVICES = ("cpu",)  # every one that sessions can be opened on


@dataclass
class VerificationResult:
    """What a comparison showed, good or bad."""

    reference: str
    cases: list[VerifiedCase] = field(default_factory=list)
    pictures: list[ImagePair] = field(default_factory=list)
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
        if bad := _bad(self.cases):
            raise VerificationError(
                f"{bad}. No bundle was written. --report FILE.html shows the pictures, --atol sets another tolerance, --no-verify leaves the check out.",
                self.verification,
            )


def _bad(cases: Sequence[VerifiedCase]) -> str | None:
    """How many cases are over tolerance, and the worst of them; None where all are within it."""
    bad = [case for case in cases if not passes(case)]
    if not bad:
        return None
    worst = max(bad, key=lambda case: case.max_abs / case.atol if math.isfinite(case.max_abs) else math.inf)
    what = f"{worst.graph}.{worst.dtype} at batch {worst.batch_size}" + (f", {worst.steps} steps" if worst.steps else "")
    quality = "" if worst.min_psnr is None or worst.psnr is None else f", PSNR {worst.psnr:.1f} dB, at least {worst.min_psnr:g}"
    return f"{len(bad)} of {len(cases)} cases are over tolerance; the worst is {what}: max abs error {worst.max_abs:.3g}, tolerance {worst.atol:.3g}{quality}"


def verify_bundle(folder: Path, manifest: Manifest, references: References, atol: float | None, progress: Progress) -> VerificationResult:
    """Draw the references' samples through the bundle's graphs, in every dtype and on every device, and compare.

    That is done on ONNX Runtime alone. Where the native library is installed and fits the bundle, every graph is opened once more with its kernels, and one
    sample compared; these cases are not part of the outcome, but their failure is.

    Args:
        folder: of the bundle. A stand-in for a bfloat16 graph lies there for as long as it takes to open it.
        manifest: of the bundle.
        references: of the same model.
        atol: the largest difference allowed, in the state's scale; None for the tables of ``tolerances.py``. Tolerances of pixels change in proportion,
            and no PSNR is asked for.
        progress: called with the name of each stage.
    """
    outcome = VerificationResult(references.name)
    if not references.finite:
        outcome.failure = "the PyTorch sampler itself gives values that are not finite: are these the trained weights?"
        return outcome
    try:
        for device in DEVICES:
            for dtype in manifest.dtypes:
                for case, picture in compare(Graphs(folder, manifest, dtype, device, references, atol, progress)):
                    outcome.cases.append(case)
                    outcome.pictures += [] if picture is None else [picture]
    except InferenceError as error:
        outcome.failure = f"on ONNX Runtime alone the bundle does not run: {error}"
    except ExportError as error:  # bfloat16 that cannot be emulated
        outcome.failure = f"{error}. --no-verify leaves the check out."
    if outcome.passed:
        outcome.failure = _failure_with_kernels(folder, manifest, references, atol, progress)
    return outcome


# ----------------------------------------------------------------------------
# With the native library, whose kernels take the place of the function bodies.


def _failure_with_kernels(folder: Path, manifest: Manifest, references: References, atol: float | None, progress: Progress) -> str | None:
    """What is wrong with the bundle where the native library is registered; None where nothing is, or where no library fits."""
    cases: list[VerifiedCase] = []
    failure = None
    try:
        library = usable_on_cpu(manifest)
        if library is None:
            return None
        for dtype in (dtype for dtype in manifest.dtypes if dtype != "bf16"):  # which ONNX Runtime has no kernels for on the CPU
            graphs = Graphs(folder, manifest, dtype, "cpu", _once(manifest, references), _widened(atol, dtype, manifest, references), progress, library.path)
            cases += [case for case, _ in compare(graphs)]
        failure = _bad(cases)
    except NativeOpsError as error:
        progress(f"verifying without the native library: {error}")
    except InferenceError as error:
        failure = f"the bundle does not run: {error}"
    if failure is None:
        return None
    return f"with the native library registered, {failure}. --no-custom-ops leaves its operators out of the bundle, --no-verify leaves the check out."


def _once(manifest: Manifest, references: References) -> References:
    """One sample of what the references hold: through every graph, or for a large network through the step and the smallest composed sampler."""
    first, large = references.drawn[0], manifest.parameters > LARGE_NETWORK
    drawn = [
        replace(one, batch_sizes=() if large or one is not first else (1,), composed=() if large and one is not first else one.composed[:1])
        for one in references.drawn
        if one.way == first.way and one.sampler is None
    ]
    evaluated = [replace(one, inputs={name: values[-1:] for name, values in one.inputs.items()}, x_next=one.x_next[-1:]) for one in references.evaluated[:1]]
    mapped = [replace(one, given=one.given[-1:], expected=one.expected[-1:]) for one in references.mapped]
    return replace(references, drawn=drawn, evaluated=evaluated, mapped=mapped)


def _widened(atol: float | None, dtype: Dtype, manifest: Manifest, references: References) -> float | None:
    """A tolerance as asked for, but no stricter than the kernels' own rounding."""
    stored = "fp16" if manifest.weights_dtype == "fp32" else manifest.weights_dtype
    return None if atol is None else max(atol, sample_atol(dtype, stored, references.sigma_data))
