"""``scm-export``: contents of a bundle, and bundles that fail verification."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from both_ways import check_both_ways
from scm_export import cli, export, ops
from scm_export.checkpoints import load_checkpoint, save_checkpoint
from scm_export.families import build_model
from scm_export.parametrisation import sample
from scm_export.verification.tolerances import sample_atol
from scm_runtime import Generator
from scm_runtime.bundle.manifest import WEIGHTS, read_manifest


@pytest.fixture(scope="module")
def half_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_checkpoint, tmp_path_factory.mktemp("half") / "tiny.scm", dtype="fp16", steps=(2,)).path


def test_the_bundle_samples_what_pytorch_samples(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    model = build_model(load_checkpoint(tiny_checkpoint))
    seeds, labels = [3, -4, 5, 6, 7], [0, 3, 1, 2, 2]
    noises = [ops.philox_normal(torch.tensor(seeds), draw, model.sample_shape) for draw in range(3)]
    expected = sample(model.step, noises, model.times[2], model.initial_scale, {"class_labels": torch.tensor(labels)})
    with Generator(tiny_bundle) as generate:
        found = generate(labels, seed=seeds, output_type="latent")
    np.testing.assert_allclose(found.array, expected.numpy(), atol=sample_atol("fp32", "fp32"))
    assert expected.std() > 0.1


def test_the_manifest_describes_the_bundle(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    assert manifest.source.sha256 == hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest()
    assert manifest.times["1"] == pytest.approx((1.564546, 0), abs=1e-6)
    assert manifest.times["2"] == pytest.approx((1.564546, 1.1, 0), abs=1e-6)
    assert manifest.parameters == sum(p.numel() for p in build_model(load_checkpoint(tiny_checkpoint)).step.parameters())
    assert set(manifest.files) | {"scm.json"} == {path.name for path in tiny_bundle.iterdir()}
    assert manifest.verification is not None
    cases = {(case.graph, case.batch_size, case.steps) for case in manifest.verification.cases}
    assert {("step", batch, steps) for batch in (1, 3) for steps in (1, 2)} <= cases
    assert {("sample-2", batch, 2) for batch in (1, 3)} <= cases
    assert all(0 <= case.max_abs <= case.atol for case in manifest.verification.cases)


def test_graphs_have_a_dynamic_batch_and_no_paths_of_this_machine(tiny_bundle: Path) -> None:
    for path in tiny_bundle.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        for value in (*model.graph.input, *model.graph.output):
            if value.type.tensor_type.shape.dim:
                assert value.type.tensor_type.shape.dim[0].dim_param == "batch", (path.name, value.name)
        data = path.read_bytes()
        assert b".py" not in data, path.name
        assert str(Path.home()).encode() not in data, path.name


def test_half_weights_are_stored_once_and_serve_both_graphs(half_bundle: Path, tiny_bundle: Path) -> None:
    half, full = read_manifest(half_bundle), read_manifest(tiny_bundle)
    assert half.dtypes == ("fp16", "fp32")
    assert half.composed_steps == (2,)
    assert half.files[WEIGHTS].size < 0.62 * full.files[WEIGHTS].size
    arguments = {"class_labels": [0, 1, 2, 3], "seed": 5, "output_type": "latent"}
    with Generator(tiny_bundle) as exact, Generator(half_bundle) as stored, Generator(half_bundle, dtype="fp16") as computed:
        expected = exact(**arguments).array  # type: ignore[arg-type]  # keywords by name
        for generate in (stored, computed):
            found = generate(**arguments).array  # type: ignore[arg-type]  # keywords by name
            np.testing.assert_allclose(found, expected, atol=sample_atol(generate.dtype, "fp16"))
            assert not np.array_equal(found, expected)


def test_every_graph_opens_with_and_without_the_native_library(tiny_bundle: Path, half_bundle: Path, tiny_guided: tuple[Path, Path, Path]) -> None:
    for bundle in (tiny_bundle, half_bundle, tiny_guided[0]):
        check_both_ways(bundle)


def test_two_exports_are_identical_to_the_byte(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    again = export(tiny_checkpoint, tmp_path / "tiny.scm", verify=False)
    first = read_manifest(tiny_bundle)
    assert again.manifest.files == first.files
    assert again.manifest.verification is None


@pytest.mark.parametrize("opset", [18, 23])
def test_other_opsets_export_and_verify(tiny_checkpoint: Path, tmp_path: Path, opset: int) -> None:
    done = export(tiny_checkpoint, tmp_path / "tiny.scm", opset=opset, steps=(1,))
    assert onnx.load(done.path / "step.fp32.onnx", load_external_data=False).opset_import[0].version == opset


def test_an_unconditional_guided_model_has_the_inputs_it_needs(small_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(small_checkpoint)
    checkpoint.config |= {"label_dim": 0, "guidance_embedding": True}
    checkpoint.label_names = None
    checkpoint.weights["emb_guidance.weight"] = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    del checkpoint.weights["emb_label.weight"]
    save_checkpoint(checkpoint, tmp_path / "guided.pt")
    done = export(tmp_path / "guided.pt", steps=(), dtype="fp16")
    assert done.path == tmp_path / "guided.scm"
    assert [item.name for item in done.manifest.conditioning] == ["guidance_scale"]
    with Generator(done.path) as generate:
        default, weak, strong = (generate(seed=1, guidance_scale=scale, output_type="latent").array for scale in (None, 1.0, 2.0))
    np.testing.assert_array_equal(default, weak)
    assert np.abs(strong - weak).max() > 1e-4


def test_over_tolerance_there_is_no_bundle_and_the_exit_code_is_1(small_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.scm"
    result = CliRunner().invoke(cli.main, [str(small_checkpoint), "-o", str(out), "--atol", "1e-12"])
    assert result.exit_code == 1
    assert "over tolerance" in result.output
    assert "1.00e-12" in result.output  # the table of cases
    assert list(tmp_path.iterdir()) == []


def test_json_goes_to_stdout_and_progress_elsewhere(small_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.scm"
    result = CliRunner().invoke(cli.main, [str(small_checkpoint), "-o", str(out), "--steps", "", "--no-verify", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((out / "scm.json").read_text())
    assert "tracing" in result.stderr


def test_force_replaces_a_bundle_and_leaves_nothing_else(small_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.scm"
    out.mkdir()
    (out / "scm.json").write_text("an earlier bundle")
    export(small_checkpoint, out, steps=(), verify=False, force=True)
    assert read_manifest(out).composed_steps == ()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.scm"]
