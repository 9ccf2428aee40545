"""Comparison of a bundle with the references: in one dtype, on one device, with the native library or without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from scm_export.errors import ExportError
from scm_export.verification.bf16_emulation import emulated_graph
from scm_export.verification.references import (
    BATCH_SIZES,
    LARGE_NETWORK,
    ConditioningCase,
    ReferenceMapping,
    References,
    ReferenceStep,
    describe_case,
    describe_steps,
)
from scm_export.verification.runtime_sampler import RuntimeSampler
from scm_export.verification.text import PROMPTS, ReferenceText, check_ids
from scm_export.verification.tolerances import PIXEL_ATOL, min_psnr, min_text_psnr, sample_atol, text_atol
from scm_runtime.bundle.manifest import Dtype, Manifest, VerifiedCase
from scm_runtime.engines.sessions import text_results
from scm_runtime.errors import InferenceError
from scm_runtime.ort.open_session import open_session
from scm_runtime.ort.options import SessionSettings
from scm_runtime.ort.session import Session

Progress = Callable[[str], None]

LARGER_BATCH_FACTOR = 2  # the larger batch holds the samples of a single step this many times


@dataclass(frozen=True)
class ImagePair:
    """Samples of the reference and of the bundle, as pixels uint8 ``[N, H, W, C]`` or latents float32 ``[N, C, ...]``."""

    title: str
    expected: NDArray[Any]
    actual: NDArray[Any]


@dataclass(frozen=True)
class BundleUnderTest:
    """A bundle's graphs of one dtype on one device, with the references and tolerances that apply to them."""

    folder: Path
    manifest: Manifest
    dtype: Dtype
    device: str
    references: References
    atol: float | None
    progress: Progress
    library: Path | None = None
    """Library of native kernels, which replace the function bodies; None to run the bodies in the bundle."""

    def open_graph(self, name: str) -> Session:
        """Open a graph of this dtype, such as "step"."""
        return self.open_session(self.folder / f"{name}.{self.dtype}.onnx")

    def open_session(self, path: Path) -> Session:
        """Open a graph as hosts do, except that the sessions of large networks save memory, and that bfloat16 is emulated on the CPU."""
        # The step of a float32 bundle is run exactly as hosts run it, whatever its size.
        as_hosts = not path.name.startswith("sample-") and self.manifest.weights_dtype == "fp32" and self.library is None
        settings = SessionSettings(low_memory=self.manifest.parameters > LARGE_NETWORK and not as_hosts, library=self.library)
        if path.name.endswith(".bf16.onnx") and self.device == "cpu":
            with emulated_graph(path) as emulated:
                return open_session(emulated, settings)
        return open_session(path, settings)

    @property
    def dtypes(self) -> tuple[Dtype, str]:
        """Key of the tolerance tables: the compute dtype and the dtype of the weights.

        With float32 weights the native library counts as fp16 weights. Its kernels for matrix units split a float32 into the sum of two bfloat16, which
        is more precise than float16 and less than float32.
        """
        stored = self.manifest.weights_dtype
        return self.dtype, "fp16" if self.library is not None and stored == "fp32" else stored

    def state_atol(self, expected: NDArray[np.float32]) -> float:
        """Tolerance of a state. It grows with the state's standard deviation if that exceeds sigma_data, as it may for untrained weights."""
        if self.atol is not None:
            return self.atol
        return sample_atol(*self.dtypes, max(self.references.sigma_data, float(expected.std())))

    @property
    def pixel_atol(self) -> float:
        """Tolerance of pixels that a network makes, in levels."""
        return PIXEL_ATOL[self.dtypes] * (1 if self.atol is None else self.atol / sample_atol(*self.dtypes, self.references.sigma_data))

    def compare_arrays(
        self,
        graph: str,
        expected: NDArray[Any],
        actual: NDArray[Any],
        atol: float,
        *,
        case: ConditioningCase | None = None,
        sampler: str | None = None,
        steps: int = 0,
        times: Sequence[float] = (),
        unit: float = 1.0,
        pixels: tuple[NDArray[Any], NDArray[Any]] | None = None,
    ) -> VerifiedCase:
        """Compare two arrays.

        Args:
            graph: name of the graph, without the dtype.
            expected: of the reference, ``[N, ...]``.
            actual: of the bundle, ``[N, ...]``.
            atol: tolerance.
            case: the conditioning.
            sampler: name of the sampler.
            steps: number of steps; 0 if the samples did not come from a sampler.
            times: times of single steps.
            unit: value of a difference of 1 in the scale of ``atol``.
            pixels: (expected, actual) for the PSNR; None for the PSNR of the arrays.
        """
        difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64)) * unit
        return VerifiedCase(
            graph=graph,
            dtype=self.dtype,
            device=self.device,
            batch_size=len(actual),
            sampler=sampler,
            steps=steps,
            times=tuple(times),
            guidance_scale=None if case is None else case.guidance_scale,
            sizes={} if case is None else case.sizes,
            max_abs=float(difference.max()),
            mean_abs=float(difference.mean()),
            atol=atol,
            psnr=_psnr(*(pixels or (expected, actual))),
            min_psnr=None if self.atol is not None else min_psnr(*self.dtypes),
        )


def _psnr(expected: NDArray[Any], actual: NDArray[Any]) -> float | None:
    """PSNR in dB. The peak is 255 for pixels, otherwise the range of ``expected``. None for identical arrays, NaN if a value is not finite."""
    mse = float(np.square(actual.astype(np.float64) - expected).mean())
    peak = 255.0 if expected.dtype == np.uint8 else float(np.ptp(expected))
    if mse == 0:
        return None
    return 10 * math.log10(max(peak, 1e-30) ** 2 / mse) if math.isfinite(mse) else math.nan


def compare_bundle(bundle: BundleUnderTest) -> Iterator[tuple[VerifiedCase, ImagePair | None]]:
    """Compare all results of the references. Yields each case, with its images if there are any.

    Raises:
        InferenceError: a graph does not open or does not run.
        ExportError: a bfloat16 graph cannot be emulated, or the step fails for a larger batch.
        NativeOpsError: ONNX Runtime rejects the library.
    """
    for count in sorted(bundle.manifest.composed_steps, reverse=True):
        yield from ((case, None) for case in _compare_composed(bundle, count))
    yield from _compare_step(bundle)
    if bundle.references.text is not None:
        yield from ((case, None) for case in _compare_text(bundle, bundle.references.text))
    for mapping in bundle.references.mappings:
        yield from ((case, None) for case in _compare_mapping(bundle, mapping))


# ----------------------------------------------------------------------------
# Each group of graphs has a function of its own: their sessions are freed when it returns.


def _compare_composed(bundle: BundleUnderTest, count: int) -> list[VerifiedCase]:
    """Compare whole samplers in one graph."""
    references = bundle.references
    wanted = [(one, n) for one in references.samples if one.sampler is None and one.steps == count for n in one.composed_batch_sizes]
    if not wanted and bundle.library is None:  # with the library, every graph is at least opened
        return []
    cases, level = [], references.level
    session = bundle.open_graph(f"sample-{count}")
    for samples, n in wanted:
        bundle.progress(f"verifying sample-{count}.{bundle.dtype}: batch {n}{describe_case(samples.case)}")
        assert samples.pixels is not None
        actual = session(seeds=samples.seeds[-n:], **{name: values[-n:] for name, values in samples.conditioning.items()})
        expected = samples.pixels[-n:]
        if expected.dtype != np.uint8:
            atol, unit = bundle.state_atol(expected), 1.0
        elif level is None:
            atol, unit = bundle.pixel_atol, 1.0
        else:  # pixels computed from the state: compared in the state's scale, where rounding to a level adds up to one level
            atol, unit = bundle.state_atol(samples.latents) + level, level
        cases.append(bundle.compare_arrays(f"sample-{count}", expected, actual, atol, case=samples.case, steps=count, unit=unit))
    return cases


def _compare_step(bundle: BundleUnderTest) -> Iterator[tuple[VerifiedCase, ImagePair | None]]:
    """Compare the step graph: single steps, and samples of the runtime's own loop."""
    references, dtype = bundle.references, bundle.dtype
    sampler = RuntimeSampler(bundle.folder, bundle.manifest, dtype, bundle.open_session)
    for single in references.single_steps:
        bundle.progress(f"verifying step.{dtype}: single evaluations")
        yield _compare_single_step(bundle, sampler.step, single), None
    if bundle.manifest.family == "module" and bundle.library is None:
        bundle.progress(f"verifying step.{dtype}: a larger batch")
        yield _compare_larger_batch(bundle, sampler.step, references.single_steps[0]), None
    for samples in references.samples:
        for n in samples.batch_sizes:
            bundle.progress(f"verifying step.{dtype}: {describe_steps(samples)}, batch {n}{describe_case(samples.case)}")
            expected_pixels = samples.pixels if samples.pixels is not None and len(samples.pixels) >= n else None
            state, actual_pixels = sampler.sample(samples, n, decode=expected_pixels is not None)
            pixels = images = None
            if expected_pixels is not None and actual_pixels is not None:
                pixels = (expected_pixels[-n:], actual_pixels)
                if n == len(expected_pixels):
                    images = ImagePair(f"{dtype} on {bundle.device}, {describe_steps(samples)}{describe_case(samples.case)}", *pixels)
            expected = samples.latents[-n:]
            case = bundle.compare_arrays(
                "step", expected, state, bundle.state_atol(expected), case=samples.case, sampler=samples.sampler, steps=samples.steps, pixels=pixels
            )
            yield case, images


def _compare_single_step(bundle: BundleUnderTest, step: Session, single: ReferenceStep) -> VerifiedCase:
    times = [float(f"{t:.7g}") for t in single.inputs["t"].tolist()]
    return bundle.compare_arrays("step", single.x_next, step(**single.inputs), bundle.state_atol(single.x_next), case=single.case, times=times)


def _compare_larger_batch(bundle: BundleUnderTest, step: Session, single: ReferenceStep) -> VerifiedCase:
    """Compare a batch larger than any that the network was called with in PyTorch, whose size the graph might contain as a constant.

    Raises:
        ExportError: the graph fails for this batch.
    """
    inputs = {name: np.concatenate([values] * LARGER_BATCH_FACTOR) for name, values in single.inputs.items()}
    repeated = replace(single, inputs=inputs, x_next=np.concatenate([single.x_next] * LARGER_BATCH_FACTOR))
    try:
        return _compare_single_step(bundle, step, repeated)
    except InferenceError as error:
        n = len(repeated.x_next)
        raise ExportError(
            f"the step fails for {n} samples, more than the network was called with while it was exported: {error} If the network keeps a table of the "
            "batch's size between calls, make that table at every call"
        ) from error


def _compare_text(bundle: BundleUnderTest, expected: ReferenceText) -> list[VerifiedCase]:
    """Compare token ids, and the outputs of the text graph for all prompts at once and for the last one."""
    text, name = bundle.manifest.text, f"text.{bundle.dtype}.onnx"
    assert text is not None
    inputs = check_ids(bundle.folder, text, expected)
    if name not in bundle.manifest.files:  # a host then uses the fp32 graph
        return []
    cases = []
    stored = "fp16" if bundle.library is not None and text.weights_dtype == "fp32" else text.weights_dtype
    session, results = bundle.open_graph("text"), text_results(bundle.manifest)
    session.expect_all(list(inputs), results)
    for n in (len(PROMPTS), 1):
        bundle.progress(f"verifying text.{bundle.dtype}: batch {n}")
        found = session.run_all({name: values[-n:] for name, values in inputs.items()}, results)
        for output, all_expected, actual in zip(text.outputs, expected.outputs, found, strict=True):
            wanted = all_expected[-n:]
            atol = text_atol(bundle.dtype, stored, float(np.abs(wanted).max()), bundle.references.sigma_data, bundle.atol)
            case = bundle.compare_arrays("text", wanted, actual, atol)
            quality = None if bundle.atol is not None else min_text_psnr(bundle.dtype, stored)
            cases.append(msgspec.structs.replace(case, output=output, min_psnr=quality))
    return cases


def _compare_mapping(bundle: BundleUnderTest, mapping: ReferenceMapping) -> list[VerifiedCase]:
    """Compare a network between latents and images."""
    atol = bundle.pixel_atol if mapping.expected.dtype == np.uint8 else bundle.state_atol(mapping.expected)
    session = bundle.open_graph(mapping.graph)
    cases = []
    for n in (n for n in BATCH_SIZES if n <= len(mapping.inputs)):
        bundle.progress(f"verifying {mapping.graph}.{bundle.dtype}: batch {n}")
        cases.append(bundle.compare_arrays(mapping.graph, mapping.expected[-n:], session(**{mapping.input_name: mapping.inputs[-n:]}), atol))
    return cases
