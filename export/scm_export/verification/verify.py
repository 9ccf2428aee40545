"""``verify_bundle``: compare a bundle with its references, on ONNX Runtime alone and with the native library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from scm_export.errors import ExportError, VerificationError
from scm_export.verification.compare import BundleUnderTest, ImagePair, Progress, compare_bundle
from scm_export.verification.references import LARGE_NETWORK, References
from scm_export.verification.tolerances import passes, sample_atol
from scm_runtime.bundle.manifest import Dtype, Manifest, Verification, VerifiedCase
from scm_runtime.errors import InferenceError, NativeOpsError
from scm_runtime.ort.native_ops import usable_on_cpu

DEVICES = ("cpu",)  # devices to open sessions on


@dataclass
class VerificationResult:
    """Cases and images of a verification, whether the bundle passed or not."""

    reference: str
    cases: list[VerifiedCase] = field(default_factory=list)
    images: list[ImagePair] = field(default_factory=list)
    failure: str | None = None
    """Why the comparison stopped: a graph does not run, or PyTorch's own results are not finite. None if it is complete."""

    @property
    def verification(self) -> Verification | None:
        """The manifest's record of the cases; None if there are none."""
        cases = sorted(self.cases, key=lambda case: (case.device, case.dtype, case.graph != "step", case.graph))
        return Verification(reference=self.reference, device=", ".join(DEVICES), cases=tuple(cases)) if cases else None

    @property
    def passed(self) -> bool:
        """True if the comparison is complete and every case is within tolerance."""
        return self.failure is None and all(passes(case) for case in self.cases)

    def require_passed(self) -> None:
        """Raise VerificationError unless the bundle passed."""
        if self.failure is not None:
            raise VerificationError(self.failure, self.verification)
        if over := _summarize_failures(self.cases):
            raise VerificationError(
                f"{over}. No bundle was written. --report FILE.html shows the images, --atol sets another tolerance, --no-verify skips the verification.",
                self.verification,
            )


def _summarize_failures(cases: Sequence[VerifiedCase]) -> str | None:
    """Number of cases over tolerance, and the worst of them; None if all are within tolerance."""
    over = [case for case in cases if not passes(case)]
    if not over:
        return None
    worst = max(over, key=lambda case: case.max_abs / case.atol if math.isfinite(case.max_abs) else math.inf)
    what = f"{worst.graph}.{worst.dtype}{'' if worst.output is None else f' ({worst.output})'} at batch {worst.batch_size}" + (
        f", {worst.steps} steps" if worst.steps else ""
    )
    quality = "" if worst.min_psnr is None or worst.psnr is None else f", PSNR {worst.psnr:.1f} dB, at least {worst.min_psnr:g}"
    return f"{len(over)} of {len(cases)} cases are over tolerance; the worst is {what}: max abs error {worst.max_abs:.3g}, tolerance {worst.atol:.3g}{quality}"


def verify_bundle(folder: Path, manifest: Manifest, references: References, atol: float | None, progress: Progress) -> VerificationResult:
    """Compute the references' samples with the bundle's graphs, in every dtype and on every device, and compare them.

    This runs on ONNX Runtime alone. If the native library is installed and fits the bundle, every graph is then opened once more with its kernels, and one
    sample compared. Those cases are not part of the result, but a failure among them is.

    Args:
        folder: of the bundle. Emulations of bfloat16 graphs are written there while they are opened.
        manifest: of the bundle.
        references: of the same model.
        atol: largest allowed absolute difference in the scale of the state; None for the tables in ``tolerances.py``. If given, tolerances of pixels are
            scaled in proportion, and PSNR is not checked.
        progress: called with the name of each stage.
    """
    result = VerificationResult(references.name)
    if not references.finite:
        result.failure = "the PyTorch sampler itself gives values that are not finite: are these the trained weights?"
        return result
    try:
        for device in DEVICES:
            for dtype in manifest.dtypes:
                for case, images in compare_bundle(BundleUnderTest(folder, manifest, dtype, device, references, atol, progress)):
                    result.cases.append(case)
                    result.images += [] if images is None else [images]
    except InferenceError as error:
        result.failure = f"the bundle does not run on ONNX Runtime without the native library: {error}"
    except ExportError as error:
        result.failure = f"{error}. --no-verify skips the verification."
    if result.passed:
        result.failure = _failure_with_native_library(folder, manifest, references, atol, progress)
    return result


# ----------------------------------------------------------------------------
# The same bundle with the native library, whose kernels replace the function bodies.


def _failure_with_native_library(folder: Path, manifest: Manifest, references: References, atol: float | None, progress: Progress) -> str | None:
    """What fails if the native library is registered; None if nothing does, or if no library fits the bundle."""
    cases: list[VerifiedCase] = []
    failure = None
    try:
        library = usable_on_cpu(manifest)
        if library is None:
            return None
        reduced = _reduce(manifest, references)
        for dtype in (dtype for dtype in manifest.dtypes if dtype != "bf16"):  # ONNX Runtime has no bfloat16 kernels for the CPU
            bundle = BundleUnderTest(folder, manifest, dtype, "cpu", reduced, _loosen(atol, dtype, manifest, references), progress, library.path)
            cases += [case for case, _ in compare_bundle(bundle)]
        failure = _summarize_failures(cases)
    except NativeOpsError as error:
        progress(f"verifying without the native library: {error}")
    except InferenceError as error:
        failure = f"the bundle does not run: {error}"
    if failure is None:
        return None
    return f"with the native library registered, {failure}. --no-custom-ops leaves its operators out of the bundle, --no-verify skips the verification."


def _reduce(manifest: Manifest, references: References) -> References:
    """One sample of the references: for every graph, or for a large network only for the step and the smallest composed sampler."""
    first, large = references.samples[0], manifest.parameters > LARGE_NETWORK
    samples = [
        replace(
            one,
            batch_sizes=() if large or one is not first else (1,),
            composed_batch_sizes=() if large and one is not first else one.composed_batch_sizes[:1],
        )
        for one in references.samples
        if one.case == first.case and one.sampler is None
    ]
    steps = [replace(one, inputs={name: values[-1:] for name, values in one.inputs.items()}, x_next=one.x_next[-1:]) for one in references.single_steps[:1]]
    mappings = [replace(one, inputs=one.inputs[-1:], expected=one.expected[-1:]) for one in references.mappings]
    return replace(references, samples=samples, single_steps=steps, mappings=mappings)


def _loosen(atol: float | None, dtype: Dtype, manifest: Manifest, references: References) -> float | None:
    """The requested tolerance, but at least the rounding error of the kernels."""
    stored = "fp16" if manifest.weights_dtype == "fp32" else manifest.weights_dtype
    return None if atol is None else max(atol, sample_atol(dtype, stored, references.sigma_data))
