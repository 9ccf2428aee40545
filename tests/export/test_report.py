"""``--report``: one page with cases, facts and images, whether the bundle passed or not."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from scm_export import cli, exporter
from scm_export.verification.compare import ImagePair
from scm_export.verification.references import FIRST_SEED
from scm_export.verification.report import to_html
from scm_export.verification.verify import VerificationResult, verify_bundle
from scm_runtime import Generator
from scm_runtime.bundle.manifest import Manifest, VerifiedCase, read_manifest
from support import tree


def images_of(page: str) -> list[tuple[str, NDArray[np.uint8]]]:
    """Label and pixels of every image of a page, in order."""
    found = re.findall(r'alt="([^"]+)"[^>]*src="data:image/png;base64,([^"]+)"', page)
    return [(label, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))) for label, data in found]


@pytest.fixture(scope="module")
def reported(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Path of a bundle, and the HTML of its report."""
    folder = tmp_path_factory.mktemp("report")
    arguments = [str(small_checkpoint), "-o", str(folder / "tiny.scm"), "--dtype", "fp16", "--steps", "", "--report", str(folder / "report.html")]
    result = CliRunner(catch_exceptions=False).invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output
    assert f"wrote {folder / 'report.html'}" in result.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "tiny.scm"]
    return folder / "tiny.scm", (folder / "report.html").read_text("utf-8")


def test_the_page_has_every_case_and_all_facts(reported: tuple[Path, str]) -> None:
    bundle, page = reported
    manifest = read_manifest(bundle)
    assert manifest.verification is not None
    assert page.count("<tr>") + page.count('<tr class="over">') == len(manifest.verification.cases) + 1 + page.split("<h2>Cases")[0].count("<tr>")
    for case in manifest.verification.cases:
        assert f'<td class="number">{case.max_abs:.2e}</td>' in page
    for fact in (manifest.source.sha256, manifest.family, f"{manifest.parameters:,}", manifest.verification.reference, "onnxruntime", "torch", "Apache-2.0"):
        assert fact in page
    assert "verification passed" in page
    assert 'class="over"' not in page


def test_the_page_needs_no_other_file(reported: tuple[Path, str]) -> None:
    sources = re.findall(r'(?:src|href)="([^"]{0,30})|url\(', reported[1])
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in reported[1]


def test_images_show_the_reference_the_bundle_and_their_difference(reported: tuple[Path, str]) -> None:
    bundle, page = reported
    shown = images_of(page)
    assert len(shown) == 2 * 2 * 3 * 3  # dtypes, step counts, samples, columns
    titles = re.findall("<figcaption>([^<]+)", page)
    assert titles == ["fp16 on cpu, 1 step", "fp16 on cpu, 2 steps", "fp32 on cpu, 1 step", "fp32 on cpu, 2 steps"]
    with Generator(bundle, dtype="fp16", native_ops=False) as generate:
        generated = generate([3, (3 - 7) % 4, (3 - 14) % 4], seed=FIRST_SEED, num_inference_steps=2, output_type="np").array
    for sample, expected in enumerate(generated):
        (_, reference), (_, found), (label, difference) = shown[9 + 3 * sample : 12 + 3 * sample]
        np.testing.assert_array_equal(found, expected)
        gain = int(re.fullmatch(r"difference × (\d+)", label)[1])  # type: ignore[index]  # no match fails the test as well
        np.testing.assert_array_equal(difference, np.abs(reference.astype(int) - found) * gain)
        assert 64 <= difference.max() <= 255 or gain == 64


def test_a_bundle_that_fails_leaves_its_report_and_nothing_else(small_checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    arguments = [str(small_checkpoint), "-o", str(tmp_path / "tiny.scm"), "--steps", "", "--atol", "1e-12", "--report", str(report)]
    result = CliRunner(catch_exceptions=False).invoke(cli.main, arguments)
    assert result.exit_code == 1
    assert "over tolerance" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    page = report.read_text("utf-8")
    assert "verification failed" in page
    assert page.count('<tr class="over">') == 5  # single steps, and samplers of 1 and 2 steps in batches of 1 and 3
    assert len(images_of(page)) == 2 * 3 * 3


def test_a_bundle_that_does_not_run_is_reported_too(small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(folder: Path, *arguments: Any) -> VerificationResult:
        (folder / "decode.fp32.onnx").write_bytes(b"<no> graph")
        return verify_bundle(folder, *arguments)

    monkeypatch.setattr(exporter, "verify_bundle", damaged)
    report = tmp_path / "report.html"
    result = CliRunner(catch_exceptions=False).invoke(
        cli.main, [str(small_checkpoint), "-o", str(tmp_path / "tiny.scm"), "--steps", "", "--report", str(report)]
    )
    assert result.exit_code == 1
    assert "does not run" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "the bundle does not run" in report.read_text("utf-8")


@pytest.mark.parametrize(
    ("report", "options", "wrong"),
    [
        ("none/report.html", [], "there is no folder"),
        ("tiny.scm/report.html", [], "there is no folder"),
        ("folder", [], "is a directory"),
        ("report.html", ["--no-verify"], "give one of them"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_before_the_export(
    report: str, options: list[str], wrong: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    before = tree(tmp_path)
    arguments = [str(tiny_checkpoint), "-o", str(tmp_path / "tiny.scm"), "--report", str(tmp_path / report), *options]
    result = CliRunner(catch_exceptions=False).invoke(cli.main, arguments)
    assert result.exit_code in (1, 2)
    assert wrong in result.stderr
    assert "tracing" not in result.stderr
    assert tree(tmp_path) == before


def test_a_report_inside_the_bundle_it_replaces_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "tiny.scm"
    bundle.mkdir()
    (bundle / "scm.json").write_text("{}")
    before = tree(tmp_path)
    arguments = [str(tiny_checkpoint), "-o", str(bundle), "--force", "--report", str(bundle / "report.html")]
    result = CliRunner(catch_exceptions=False).invoke(cli.main, arguments)
    assert result.exit_code == 1
    assert "inside the bundle" in result.stderr
    assert tree(tmp_path) == before


def page_of(manifest: Manifest, *pairs: ImagePair) -> str:
    case = VerifiedCase(graph="step", dtype="fp32", batch_size=1, steps=1, max_abs=0.5, atol=1.0, psnr=30.0)
    return to_html(manifest, VerificationResult("theirs <& ours>", [case], list(pairs)))


def test_latents_are_shown_channel_by_channel_in_the_references_range(tiny_bundle: Path) -> None:
    expected = np.linspace(-2, 2, 2 * 3 * 4, dtype=np.float32).reshape(1, 2, 3, 4)
    found = expected.copy()
    found[0, 1, 2, 3] = np.nan
    found[0, 0, 0, 0] = 9
    page = page_of(read_manifest(tiny_bundle), ImagePair("latents", expected, found))
    (_, reference), (_, bundle), (_, difference) = images_of(page)
    assert reference.shape == (3, 8)  # two channels, 3 x 4 each, side by side
    assert (reference[0, 0], reference[-1, -1]) == (0, 255)
    np.testing.assert_array_equal(reference[:, :4], np.round((expected[0, 0] + 2) / 4 * 255))
    assert (bundle[0, 0], bundle[-1, -1]) == (255, 0)
    assert np.count_nonzero(difference) == 2


def test_names_are_text_and_not_markup(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    manifest.name = "<b>bold</b>"
    page = page_of(manifest)
    assert "<b>" not in page
    assert "&lt;b&gt;bold" in page
    assert "theirs &lt;&amp; ours&gt;" in page


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pixels_of_any_number_of_channels_are_shown(channels: int, tiny_bundle: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 5, 6, channels), np.uint8)
    (_, reference), (_, _), (label, difference) = images_of(page_of(read_manifest(tiny_bundle), ImagePair("any", pixels, pixels)))
    assert reference.shape == {1: (5, 6), 2: (5, 12), 3: (5, 6, 3), 4: (5, 6, 4)}[channels]
    assert label == "difference × 1"
    assert not difference.any()
