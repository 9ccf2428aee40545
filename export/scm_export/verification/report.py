"""``--report``: a verification as one self-contained HTML file, with images of the reference and of the bundle side by side."""

from __future__ import annotations

import base64
import io
import os
import platform
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scm_export.verification.compare import ImagePair
from scm_export.verification.tolerances import passes
from scm_export.verification.verify import VerificationResult
from scm_runtime.bundle.manifest import Manifest, VerifiedCase
from scm_runtime.common.files import output_file
from scm_runtime.common.installed import installed_version
from scm_runtime.devices.cpu import available_cores, processor_name
from scm_runtime.errors import OutputError
from scm_runtime.samples import IMAGE_CHANNELS

EXPLANATION = (
    "Differences are in the scale of the state, or in levels if a network makes the pixels. PSNR is computed from pixels, or, if there are none, from "
    "the state with the reference's range as the peak. Steps t … are a single evaluation of samples at different times."
)
PACKAGES = ("torch", "diffusers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")
MIN_SHOWN_SIDE = 128  #  CSS pixels; smaller images are enlarged without smoothing
MAX_GAIN = 64  #         of differences: single levels are visible, and a higher gain would only show rounding

STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .15rem .8rem; text-align: left; border-bottom: 1px solid #8884; vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums } tr.over td { color: #d33; font-weight: bold }
.verdict { font-weight: bold } .over { color: #d33 } .within { color: #2a8a3e } .facts td:last-child { overflow-wrap: anywhere }
figure { margin: 1rem 0; overflow-x: auto } figure div { display: flex; gap: .5rem; margin: .5rem 0 } figcaption { font-weight: bold }
img { image-rendering: pixelated } figure span { font-size: 12px; display: block }
"""


def check_report_path(path: Path, bundle: Path) -> None:
    """Raise OutputError if the report cannot be written to a path, before the export begins."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        wrong = "it is a folder" if path.is_dir() else "the folder is not writable" if folder.is_dir() else f"there is no folder '{folder}'"
        raise OutputError(f"cannot write the report '{path}': {wrong}. Choose another file for --report.")
    if bundle.absolute() in path.absolute().parents:
        raise OutputError(f"the report '{path}' would be inside the bundle '{bundle}', which contains only its own files. Choose another file for --report.")


def write_report(path: Path, manifest: Manifest, result: VerificationResult) -> None:
    """Write the report, whether the bundle passed or not, replacing an existing file. Raises OutputError if the file cannot be written."""
    try:
        with output_file(path) as part:
            part.write_text(to_html(manifest, result), "utf-8")
    except OSError as error:
        raise OutputError(f"cannot write the report '{path}': {error.strerror or error}. Choose another file for --report.") from error


def to_html(manifest: Manifest, result: VerificationResult) -> str:
    """The report as an HTML page."""
    verification = result.verification
    cases = () if verification is None else verification.cases
    over = sum(not passes(case) for case in cases)
    verdict = "passed" if result.passed else "failed"
    tally = f"{len(cases) - over} of {len(cases)} cases are within tolerance of {result.reference}"
    title = f"{manifest.name}: verification {verdict}"
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>',
            f"<style>{STYLE}</style>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="verdict {"within" if result.passed else "over"}">{escape(tally)}.</p>',
            "" if result.failure is None else f'<p class="verdict over">{escape(result.failure)}</p>',
            "<h2>Facts</h2>",
            _facts(facts(manifest)),
            "<h2>Cases</h2>",
            f"<p>{EXPLANATION}</p>",
            _cases(cases),
            "<h2>Images</h2>" if result.images else "",
            *map(_figure, result.images),
            "</html>\n",
        ]
    )


def facts(manifest: Manifest) -> dict[str, str]:
    """Facts about the bundle, the packages and the machine, by name."""
    versions = ", ".join(f"{name} {version}" for name in PACKAGES if (version := installed_version(name)) is not None)
    graphs = ", ".join(manifest.dtypes) + "".join(f", {domain} {version}" for domain, version in {"opset": manifest.opset, **manifest.ops}.items())
    times = (f"{count}: {' → '.join(f'{t:.6g}' for t in values)}" for count, values in manifest.times.items())
    return {
        "bundle": manifest.name,
        "family": manifest.family,
        "parameters": f"{manifest.parameters:,}, stored in {manifest.weights_dtype}",
        "graphs": graphs,
        "state": f"float32 [N, {', '.join(map(str, manifest.sample.shape))}], σ_d {manifest.sigma_data:g}",
        "output": f"{manifest.output.kind} [N, {', '.join(map(str, manifest.output.shape))}]",
        f"times ({manifest.time_unit})": "; ".join(times),
        "conditioning": ", ".join(f"{item.name} {item.describe()}" for item in manifest.conditioning) or "none",
        "made from": f"{manifest.source.file}, SHA-256 {manifest.source.sha256}",
        **({} if manifest.source.weights is None else {"weights": manifest.source.weights}),
        "made by": manifest.producer,
        "licence": manifest.licence or "not stated",
        "versions": f"Python {platform.python_version()}, {versions}",
        "machine": f"{platform.system()} {platform.machine()}, {processor_name()}, {available_cores()} cores",
    }


def _facts(values: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in values.items())
    return f'<table class="facts">{rows}</table>'


# ----------------------------------------------------------------------------
# Cases. The command line prints the same columns.

TEXT_COLUMNS = ("graph", "device", "steps", "conditioning")  # the other columns are numbers


def tabulate(cases: Iterable[VerifiedCase]) -> list[dict[str, str]]:
    """Rows of text by column name, without the columns that are empty in all rows."""
    rows = [_row(case) for case in cases]
    empty = {name for name in (rows[0] if rows else ()) if not any(row[name] for row in rows)}
    return [{name: value for name, value in row.items() if name not in empty} for row in rows]


def _row(case: VerifiedCase) -> dict[str, str]:
    guidance = [] if case.guidance_scale is None else [f"guidance {case.guidance_scale:g}"]
    graph = f"{case.graph}.{case.dtype}"
    return {
        "graph": graph if case.output is None else f"{graph} {case.output}",
        "device": "" if case.device == "cpu" else case.device,
        "batch": str(case.batch_size),
        "steps": f"t {case.times[0]:.3g} … {case.times[-1]:.3g}" if case.times else " ".join(filter(None, [str(case.steps or ""), case.sampler])),
        "conditioning": ", ".join([*guidance, *(f"{size} {name}" for name, size in case.sizes.items())]),
        "max abs": f"{case.max_abs:.2e}",
        "mean abs": "" if case.mean_abs is None else f"{case.mean_abs:.2e}",
        "tolerance": f"{case.atol:.2e}",
        "PSNR, dB": "exact" if case.psnr is None else f"{case.psnr:.1f}",
        "at least": "" if case.min_psnr is None else f"{case.min_psnr:g}",
    }


def _cases(cases: tuple[VerifiedCase, ...]) -> str:
    rows = tabulate(cases)
    names = list(rows[0]) if rows else []
    kinds = {name: "" if name in TEXT_COLUMNS else ' class="number"' for name in names}
    head = "".join(f"<th{kinds[name]}>{escape(name)}</th>" for name in names)
    lines = []
    for case, row in zip(cases, rows, strict=True):
        cells = "".join(f"<td{kinds[name]}>{escape(value)}</td>" for name, value in row.items())
        lines.append(f"<tr>{cells}</tr>" if passes(case) else f'<tr class="over">{cells}</tr>')
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


# ----------------------------------------------------------------------------
# Images: reference | bundle | difference × gain.


def _figure(pair: ImagePair) -> str:
    rows = []
    for expected, actual in zip(_to_images(pair.expected, pair.expected), _to_images(pair.actual, pair.expected), strict=True):
        difference, gain = _difference(expected, actual)
        images = {"reference": expected, "bundle": actual, f"difference × {gain}": difference}
        rows.append(f"<div>{''.join(_img_element(label, image) for label, image in images.items())}</div>")
    return f"<figure><figcaption>{escape(pair.title)}</figcaption>{''.join(rows)}</figure>"


def _to_images(samples: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.uint8]:
    """Images of samples, uint8 ``[N, H, W, 1, 3 or 4]``: pixels unchanged; other arrays as channels side by side, scaled to the reference's range."""
    if samples.dtype == np.uint8:
        if samples.shape[-1] in IMAGE_CHANNELS:
            return samples
        n, height, _, _ = samples.shape
        return samples.swapaxes(2, 3).reshape(n, height, -1, 1)
    channels_first = samples.reshape(len(samples), -1, *samples.shape[-2:]) if samples.ndim > 2 else samples.reshape(len(samples), 1, 1, -1)
    low, high = float(reference.min()), float(reference.max())
    levels = np.nan_to_num((channels_first.astype(np.float64) - low) / max(high - low, 1e-30) * 255).clip(0, 255).round().astype(np.uint8)
    n, _, height, _ = levels.shape
    return levels.swapaxes(1, 2).reshape(n, height, -1, 1)


def _difference(expected: NDArray[np.uint8], actual: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int]:
    """The absolute difference multiplied by a gain, and the gain: a power of two that makes the largest value clearly visible."""
    difference = np.abs(expected.astype(np.int32) - actual.astype(np.int32))
    if difference.shape[-1] == 4:
        difference = difference[..., :3]  # a difference in opacity would make the image of the difference transparent
    gain = 1
    while gain < MAX_GAIN and 0 < 2 * gain * difference.max() <= 255:
        gain *= 2
    return (difference * gain).clip(0, 255).astype(np.uint8), gain


def _img_element(label: str, image: NDArray[np.uint8]) -> str:
    height, width, channels = image.shape
    encoded = io.BytesIO()
    Image.fromarray(image[..., 0] if channels == 1 else image).save(encoded, "PNG")
    data = base64.b64encode(encoded.getvalue()).decode()
    scale = max(1, -(-MIN_SHOWN_SIDE // min(height, width)))
    return f'<span>{label}<br><img alt="{label}" width="{width * scale}" height="{height * scale}" src="data:image/png;base64,{data}"></span>'
