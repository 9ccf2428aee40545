"""The command ``scm-export``: invalid options, repositories of the hub, and interruption."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from hub_cache import Hub, add_snapshot, commit_of, serving
from scm_export import Options, cli, export, exporter, preparation
from scm_export.choices import PARAMETRISATION_NAMES
from scm_export.parametrisation import PARAMETRISATIONS
from scm_runtime.bundle.manifest import read_manifest
from support import BLOCK_IMPORTS, run_python, tree

REPOSITORY = "someone/model"


def scm_export(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
    """Run the command; returns standard output and standard error."""
    result = CliRunner(catch_exceptions=False).invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (["--latents", "--decoder", "vae"], "give one of them"),
        (["--size", "16x16"], "size must be this model's own, 8x8, got 16x16"),
        (["--size", "16"], "must be HEIGHTxWIDTH in pixels"),
        (["--size", "0x8"], "at least 1, got 0x8"),
        (["--dtype", "bf16", "--opset", "20"], "opset must be from 22 to 23 for bf16, got 20"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--opset", "17"], "18<=x<=23"),
        (["--family", "sdxl"], "family must be one of"),
        (["--revision", "main"], "Leave the revision out"),
        (["--parametrisation", "v"], "'v' is not one of"),
        (["--report", "report.html", "--no-verify"], "give one of them"),
        (["--text-dtype", "int2"], "'int2' is not one of"),
        (["--text-dtype", "int4"], "was given, but the checkpoint has no text encoder. Leave it out."),
        (["--text-dtype", "int4", "--no-text"], "leaves the text encoder out: give one of them"),
        (["--text-dtype", "int8", "--no-custom-ops"], "int8 needs operators of ONNX Runtime"),
    ],
)
def test_invalid_options_are_refused_and_nothing_is_written(
    options: list[str], wrong: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, error = scm_export(tiny_checkpoint, "-o", "out.scm", *options, code=2)
    assert wrong in error
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_torch_and_knows_every_option() -> None:
    done = run_python(
        BLOCK_IMPORTS + "sys.argv = ['scm-export', '--help']\nfrom scm_export.cli import main\nmain()", "torch,onnx,onnxscript,onnxruntime,diffusers"
    )
    for option in cli.main.params:
        if isinstance(option, click.Option):
            assert option.opts[-1] in done.stdout
            assert option.help


@pytest.mark.parametrize("module", ["scm_runtime.cli", "scm_export.cli"])
def test_help_works_with_a_click_whose_parameter_types_cannot_be_subscripted(module: str) -> None:
    """As in versions before 8.4, which pip does not upgrade."""
    program = """
import runpy, sys
import click

click.ParamType.__class_getitem__ = None
module, sys.argv = sys.argv[1], ["command", "--help"]
runpy.run_module(module, run_name="__main__")
"""
    assert "Usage: " in run_python(program, module).stdout


def test_the_command_and_export_have_the_fields_of_options() -> None:
    names = {option.name for option in cli.main.params}
    assert names - {"checkpoint", "out", "dry_run", "as_json", "version", "debug"} == set(Options.__dataclass_fields__) - {"progress"}
    assert list(inspect.signature(export).parameters) == ["checkpoint", "out", *Options.__dataclass_fields__]
    assert set(PARAMETRISATION_NAMES) == set(PARAMETRISATIONS)


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["open_checkpoint", "compute_references", "trace_step", "verify_bundle"])
def test_an_interrupt_leaves_nothing_and_exits_with_130(stage: str, small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation if stage == "open_checkpoint" else exporter, stage, interrupt)
    before = tree(tmp_path)
    _, error = scm_export(small_checkpoint, "-o", tmp_path / "out.scm", "--steps", "", "--report", tmp_path / "report.html", code=130)
    assert "Interrupted" in error
    assert tree(tmp_path) == before


# ----------------------------------------------------------------------------
# Repositories of the hub, from a cache folder.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache folder of the hub; the network is off."""
    constants = pytest.importorskip("huggingface_hub.constants")
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return folder


def test_a_repository_with_one_checkpoint_is_exported_under_its_name(cache: Path, small_checkpoint: Path) -> None:
    commit = commit_of("first")
    add_snapshot(cache, REPOSITORY, commit, {"README.md": b"a model", "weights/tiny.pt": small_checkpoint.read_bytes()}, refs=["main", "v1"])
    scm_export(REPOSITORY, "--revision", "v1", "--no-verify", "--steps", "")
    assert [path.name for path in Path().iterdir()] == ["model.scm"]
    manifest = read_manifest(Path("model.scm"))
    assert manifest.source.file == f"{REPOSITORY}@{commit}"
    assert manifest.name == "model"
    planned, _ = scm_export(REPOSITORY, "-o", "other.scm", "--dry-run", "--json")
    assert json.loads(planned)["source"] == {"file": manifest.source.file, "sha256": manifest.source.sha256}


def test_of_several_checkpoints_none_is_guessed(cache: Path) -> None:
    add_snapshot(cache, REPOSITORY, commit_of("first"), {"a.pt": b"1", "b.safetensors": b"2"}, refs=["main"])
    _, error = scm_export(REPOSITORY, code=1)
    assert "got 2 files of weights: a.pt, b.safetensors" in error
    assert "give its path" in error


def test_a_path_that_is_there_comes_before_the_hub(cache: Path, tiny_checkpoint: Path) -> None:
    add_snapshot(cache, REPOSITORY, commit_of("first"), {"a.pt": b"not this one"}, refs=["main"])
    Path("someone").mkdir()
    shutil.copy(tiny_checkpoint, REPOSITORY)
    planned, _ = scm_export(REPOSITORY, "--dry-run", "--json")
    assert json.loads(planned)["source"]["file"] == "model"
    assert json.loads(planned)["out"] == "someone/model.scm"


def test_a_repository_that_is_not_in_the_cache_is_a_clear_error(cache: Path) -> None:
    _, error = scm_export("nobody/nothing", code=2)
    assert "nobody/nothing" in error
    assert "HF_HUB_OFFLINE" in error


FETCH = """
import sys
from scm_export.checkpoints.from_hub import fetch

found = fetch(sys.argv[1], None, lambda stage: None, text="text" in sys.argv)
print(*sorted(path.relative_to(found.path).as_posix() for path in found.path.rglob("*") if path.is_file()), sep="\\n")
"""
PIPELINE = {"_class_name": "SomePipeline", "unet": ["diffusers", "UNet2DModel"], "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "T5"]}
CONFIGURATIONS = {"unet/config.json": b"{}", "vae/config.json": b"{}", "text_encoder/config.json": b"{}"}
UNUSED = {
    "text_encoder/model.safetensors": b"large",
    "unet/diffusion_flax_model.msgpack": b"large",
    "preview.png": b"large",
    "all-in-one.safetensors": b"large",
}


def test_of_a_pipeline_the_networks_are_fetched_and_nothing_else(tmp_path: Path) -> None:
    needed = {
        "model_index.json": json.dumps(PIPELINE).encode(),
        **CONFIGURATIONS,
        "unet/diffusion_pytorch_model.safetensors.index.json": b"{}",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors": b"1",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors": b"2",
        "vae/diffusion_pytorch_model.bin": b"3",
    }
    others = {"unet/diffusion_pytorch_model.fp16.safetensors": b"half", "unet/diffusion_pytorch_model.bin": b"again"}
    hub = Hub()
    hub.add(REPOSITORY, commit_of("first"), {**needed, **others, **UNUSED})
    hub.add("someone/vae", commit_of("vae"), {"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"4", "diffusion_pytorch_model.bin": b"5"})
    with serving(hub):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        ours = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        assert run_python(FETCH, REPOSITORY, env=kept | ours, cwd=tmp_path).stdout.split() == sorted(needed)
        text = {
            **{f"text_encoder/{name}": b"6" for name in ("config.json", "model.safetensors")},
            **{f"tokenizer/{name}": b"7" for name in ("vocab.json", "merges.txt")},
            "README.md": b"card",
        }
        index = json.dumps(PIPELINE | {"text_encoder": ["transformers", "CLIPTextModel"]}).encode()
        more = {"text_encoder/pytorch_model.bin": b"again", "text_encoder/flax_model.msgpack": b"large"}
        hub.add("someone/text", commit_of("text"), {**needed, "model_index.json": index, **text, **more})
        assert run_python(FETCH, "someone/text", "text", env=kept | ours, cwd=tmp_path).stdout.split() == sorted({**needed, **text})
        assert run_python(FETCH, "someone/vae", env=kept | ours, cwd=tmp_path).stdout.split() == ["config.json", "diffusion_pytorch_model.safetensors"]
