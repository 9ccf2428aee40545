"""``--dry-run``: the plan agrees with the export, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from conftest import write_tiny_checkpoint
from scm_export import Options, cli, export, exporter, plan
from scm_export.checkpoints import load_checkpoint, save_checkpoint
from scm_export.dry_run import make_plan
from scm_export.exporter import export_model
from scm_runtime.bundle.manifest import WEIGHTS, Source
from scm_runtime.errors import InvalidArgumentError
from support import tree
from text_model import text_model

SOURCE = Source(file="none", sha256="0" * 64)


def dry_run(checkpoint: Path, *options: str | Path) -> Any:
    result = CliRunner(catch_exceptions=False).invoke(cli.main, [str(checkpoint), "--dry-run", *map(str, options)])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in options else result.stdout


def test_the_plan_is_what_the_export_makes(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    manifest, planned = json.loads((tiny_bundle / "scm.json").read_text()), dry_run(tiny_checkpoint, "--json")
    for name in ("family", "licence", "source", "conditioning", "output", "sigma_data", "initial_scale", "time_unit", "times", "weights_dtype", "opset"):
        assert planned[name] == manifest[name], name
    assert planned["sample_shape"] == manifest["sample"]["shape"]
    assert planned["parameters"] == {"step": manifest["parameters"]}
    assert {*planned["graphs"], WEIGHTS} == set(manifest["files"])
    assert planned["out"] == str(tiny_checkpoint.with_suffix(".scm"))
    assert [(item["name"], item["shape"]) for item in planned["inputs"]] == [
        *(("x", ["N", 3, 8, 8]), ("t", ["N"]), ("t_next", ["N"]), ("noise", ["N", 3, 8, 8])),
        ("class_labels", ["N"]),
    ]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_size_of_the_weights_is_known_beforehand(dtype: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    planned = plan(tiny_checkpoint, tmp_path / "tiny.scm", Options(dtype=dtype))
    done = export(tiny_checkpoint, tmp_path / "tiny.scm", dtype=dtype, steps=(), verify=False)
    assert done.manifest.files[WEIGHTS].size == pytest.approx(planned.weights_bytes[dtype], rel=0.05)  # tensors are padded
    assert planned.weights_bytes["fp32"] > 1.8 * planned.weights_bytes["bf16"]


def test_every_graph_of_a_model_of_latents_is_in_the_plan(tmp_path: Path) -> None:
    planned = make_plan(text_model(), tmp_path, SOURCE, "fp32", "fp32", [1], 20, custom_ops=True)
    done = export_model(text_model(), tmp_path / "text.scm", SOURCE, Options(steps=(1,), verify=False))
    assert {*planned.graphs, WEIGHTS} == set(done.manifest.files)
    assert set(planned.parameters) == {"step", "decode", "preview", "encode"}
    assert planned.inputs[4].shape == ("N", "tokens", 12)


@pytest.mark.parametrize("options", [["--json"], ["--report", "report.html"], ["--dtype", "fp16", "--steps", "1"]])
def test_nothing_is_traced_and_nothing_is_written(options: Sequence[str], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a dry run got this far")

    for name in ("new_bundle", "trace_step", "compute_references", "write_report"):
        monkeypatch.setattr(exporter, name, forbidden)
    monkeypatch.setattr(torch.onnx, "export", forbidden)
    monkeypatch.chdir(tmp_path)
    beside = tree(tiny_checkpoint.parent)
    dry_run(tiny_checkpoint, "-o", "tiny.scm", *options)
    assert list(tmp_path.iterdir()) == []
    assert tree(tiny_checkpoint.parent) == beside


def test_the_plan_is_printed_as_a_table(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    table = dry_run(tiny_checkpoint, "--dtype", "fp16", "--steps", "2", "--no-custom-ops")
    for words in (
        "edm2",
        "class_labels int64 [N]",
        "1.56455 → 1.1 → 0 (radians)",
        "fp16, ",
        "sample-2.fp16.onnx",
        "standard operators only",
        "nothing was written",
    ):
        assert words in table
    assert "sample-1" not in table


def test_mistakes_show_in_a_dry_run_too(tiny_checkpoint: Path) -> None:
    for arguments, wrong in (
        ([tiny_checkpoint, "--steps", "3"], "steps must be among [1, 2]"),
        ([tiny_checkpoint, "-o", tiny_checkpoint], "exists and is no bundle"),
        ([tiny_checkpoint, "--family", "sdxl"], "family must be one of edm2"),
    ):
        result = CliRunner(catch_exceptions=False).invoke(cli.main, [*map(str, arguments), "--dry-run"])
        assert result.exit_code in (1, 2)
        assert wrong in result.stderr


def test_an_existing_bundle_is_no_obstacle(tiny_checkpoint: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    before = tree(tiny_bundle)
    assert "(exists: an export replaces it only with --force)" in dry_run(tiny_checkpoint, "-o", tiny_bundle)
    assert dry_run(tiny_checkpoint, "-o", tiny_bundle, "--json")["exists"] is True
    assert dry_run(tiny_checkpoint, "-o", tiny_bundle.with_name("new.scm"), "--json")["exists"] is False
    assert tree(tiny_bundle) == before


def test_four_channels_are_said_to_be_pixels_or_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    checkpoint = write_tiny_checkpoint(tmp_path / "four.pt", channel_mult=(1,), img_channels=4)
    for options, said, noted in (([], "none: the state is pixels", True), (["--latents"], "none: the state is latents, and so are the samples", False)):
        result = CliRunner(catch_exceptions=False).invoke(cli.main, [str(checkpoint), "--dry-run", *options])
        assert said in result.stdout
        assert ("taken as RGBA pixels. If it is latents, give their autoencoder with --decoder, or --latents" in result.stderr) == noted
        written = CliRunner(catch_exceptions=False).invoke(cli.main, [str(checkpoint), "--no-verify", "--steps", "", "--force", *options])
        assert ("samples: RGBA images of 8x8, the state is pixels" in written.stdout) == noted
        assert ("samples: latents, without a decoder" in written.stdout) != noted
        assert ("taken as RGBA pixels" in written.stderr) == noted


def test_in_python_it_takes_the_same_options(tiny_checkpoint: Path) -> None:
    planned = plan(tiny_checkpoint, "elsewhere.scm", Options(dtype="bf16"))
    assert (planned.out, planned.weights_dtype, planned.opset) == ("elsewhere.scm", "bf16", 22)
    assert not Path("elsewhere.scm").exists()


def test_samplers_of_many_steps_are_not_composed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A composed sampler has a copy of the network for each step: 3 000 of them took minutes to write."""
    checkpoint = load_checkpoint(tiny_checkpoint)
    checkpoint.sampler.times = {"100": tuple(1.5 - step * 0.015 for step in range(101))}
    save_checkpoint(checkpoint, tmp_path / "many.pt")
    assert not [name for name in plan(tmp_path / "many.pt").graphs if name.startswith("sample")]
    with pytest.raises(InvalidArgumentError, match="steps must be at most 64"):
        plan(tmp_path / "many.pt", options=Options(steps=(100,)))
