"""The manifest, and the validation of a bundle's folder."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

import toy_bundle
from scm_runtime import BundleIntegrityError, BundleNotFoundError, BundleSchemaError, Generator, Manifest
from scm_runtime.bundle.checksums import check_files, sha256
from scm_runtime.bundle.location import find_local
from scm_runtime.bundle.manifest import MANIFEST, read_manifest
from scm_runtime.cli.commands import main
from scm_runtime.doctor.examine import _try_provider

EMBEDDING = {"name": "prompt_embeds", "kind": "embedding", "dtype": "float32", "shape": ["tokens", 8]}


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may change."""
    return shutil.copytree(tiny_bundle, tmp_path / "copy.scm")


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = msgspec.json.decode((bundle / MANIFEST).read_bytes())
    change(raw)
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(raw))


def test_round_trip(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    data = manifest.to_json()
    assert msgspec.json.decode(data, type=Manifest) == manifest
    assert msgspec.json.decode(data) == msgspec.json.decode((tiny_bundle / MANIFEST).read_bytes())


def test_what_the_exporter_wrote(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    assert (manifest.schema_version, manifest.name, manifest.family, manifest.licence) == (1, "tiny", "edm2", "Apache-2.0")
    assert (manifest.source.file, manifest.source.sha256) == ("tiny.pt", sha256(tiny_checkpoint))
    assert (manifest.sample.shape, manifest.output.kind, manifest.output.shape) == ((3, 8, 8), "image", (8, 8, 3))
    (labels,) = manifest.conditioning
    assert (labels.name, labels.kind, labels.dtype, labels.num_classes) == ("class_labels", "class", "int64", 4)
    assert labels.label_names == ("ant", "bee", "cat", "dog")
    assert (manifest.dtypes, manifest.weights_dtype, manifest.composed_steps) == (("fp32",), "fp32", (1, 2))
    assert manifest.verification is not None
    assert all(case.max_abs <= case.atol for case in manifest.verification.cases)
    assert set(manifest.files) == {path.name for path in tiny_bundle.iterdir()} - {MANIFEST}
    assert all((tiny_bundle / name).stat().st_size == entry.size for name, entry in manifest.files.items())


def test_unknown_keys_are_ignored(bundle: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["invented_later"] = {"a": [1]}
        raw["conditioning"][0]["hint"] = "x"
        raw["files"]["noise.onnx"]["mtime"] = 3

    before = read_manifest(bundle)
    edit(bundle, change)
    assert read_manifest(bundle) == before
    with Generator(bundle) as generator:
        assert len(generator(seed=1)) == 1


def test_a_bundle_of_an_earlier_writer(tmp_path: Path) -> None:
    """Keys that were added later have defaults."""
    written = msgspec.json.decode((find_local("digits") / MANIFEST).read_bytes())
    for key in ("time_unit", "solver", "samplers"):
        del written[key]
    for case in written["verification"]["cases"]:
        for key in ("device", "mean_abs", "guidance_scale"):
            case.pop(key, None)
    (tmp_path / MANIFEST).write_bytes(msgspec.json.encode(written))
    manifest = read_manifest(tmp_path)
    assert (manifest.time_unit, manifest.solver, manifest.samplers) == ("radians", "consistency", {})
    assert manifest.verification is not None
    case = manifest.verification.cases[0]
    assert (case.device, case.mean_abs, case.guidance_scale) == ("cpu", None, None)


def test_conditioning_with_free_dimensions(bundle: Path) -> None:
    mask = {"name": "prompt_attention_mask", "kind": "mask", "dtype": "int64", "shape": ["tokens"], "default": 1}
    edit(bundle, lambda raw: raw["conditioning"].extend([EMBEDDING, mask]))
    embeds, ones = read_manifest(bundle).conditioning[1:]
    assert (embeds.shape, embeds.describe()) == (("tokens", 8), "float32 [N, tokens, 8]")
    assert (ones.shape, ones.describe()) == (("tokens",), "int64 [N, tokens]")


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../step.fp32.onnx", "..", ".", "", "a/b.onnx", "a\\b.onnx", "..\\b.onnx", "C:b.onnx", "C:\\b.onnx", "scm.json", "./b.onnx", "b.onnx/"],
)
def test_names_of_files(bundle: Path, name: str) -> None:
    edit(bundle, lambda raw: raw["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(BundleSchemaError, match="files must have plain names inside the bundle's folder, got "):
        Generator(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("schema_version"), "missing required field `schema_version`"),
        (lambda raw: raw.update(schema_version="1"), r"Expected `int`, got `str` - at `\$\.schema_version`"),
        (lambda raw: raw.update(schema_version=2), r"schema version 2, this scm-runtime reads version 1\. Upgrade it: pip install -U \. in an updated clone"),
        (lambda raw: raw.update(schema_version=0), r"schema version 0, this scm-runtime reads version 1\. Export the checkpoint again"),
        (lambda raw: raw["files"].pop("step.fp32.onnx"), r"files must list the weights and every graph of the dtypes fp32, missing step\.fp32\.onnx"),
        (lambda raw: raw["files"]["noise.onnx"].update(sha256="abc"), r"sha256"),
        (lambda raw: raw["files"]["noise.onnx"].update(size=-1), r"size"),
        (lambda raw: raw.update(dtypes=[]), r"dtypes"),
        (lambda raw: raw.update(dtypes=["fp8"]), r"fp8"),
        (lambda raw: raw.update(times={}), "times must hold at least one step count, got none"),
        (lambda raw: raw["times"].update({"2": [1.0, 0.0]}), "times for 2 steps must have 3 values, got 2"),
        (lambda raw: raw["times"].update({"0": [0.0]}), r"times"),
        (lambda raw: raw["conditioning"][0].update(num_classes=None), "conditioning 'class_labels' of kind 'class' must give num_classes"),
        (lambda raw: raw["conditioning"][0].update(num_classes=5), "conditioning 'class_labels' must have 5 label_names, got 4"),
        (lambda raw: raw["sample"].update(shape=[3, 0, 8]), "shape"),
        (lambda raw: raw["output"].update(kind="smell"), "smell"),
        (lambda raw: raw["output"].update(shape=[8, 8]), r"output of kind 'image' must have the shape \[H, W, C\], got \[8, 8\]"),
        (lambda raw: raw["output"].update(kind="latent"), r"output of kind 'latent' must have the state's shape \[3, 8, 8\], got \[8, 8, 3\]"),
        (lambda raw: raw.update(time_unit="seconds"), "seconds"),
        (lambda raw: raw["conditioning"].append(EMBEDDING | {"shape": []}), "'prompt_embeds' of kind 'embedding' must be an array per sample, got the shape"),
        (lambda raw: raw["conditioning"].append(EMBEDDING | {"shape": ["Tokens", 8]}), r"\$\.conditioning\[1\]\.shape"),
        (lambda raw: raw["conditioning"].append(EMBEDDING | {"shape": ["tokens", 0]}), r"\$\.conditioning\[1\]\.shape"),
        (lambda raw: raw["conditioning"].append(EMBEDDING | {"dtype": "int64"}), "'prompt_embeds' of kind 'embedding' must have the dtype float32, got int64"),
        (lambda raw: raw["conditioning"].append(EMBEDDING | {"default": 0.0}), "'prompt_embeds' of kind 'embedding' must have no default, got 0.0"),
        (
            lambda raw: raw["conditioning"].append(EMBEDDING | {"name": "t_next"}),
            "conditioning must have other names than the step graph's x, t, t_next, noise",
        ),
        (
            lambda raw: raw["conditioning"].append(EMBEDDING | {"name": "class_labels"}),
            "conditioning must have different names, got class_labels, class_labels",
        ),
        (lambda raw: raw["conditioning"].append(EMBEDDING | {"kind": "mask"}), "'prompt_embeds' of kind 'mask' must have the dtype int64, got float32"),
        (
            lambda raw: raw["conditioning"][0].update(shape=["tokens"]),
            r"'class_labels' of kind 'class' must be one number per sample, got the shape \['tokens'\]",
        ),
    ],
)
def test_malformed(bundle: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit(bundle, change)
    with pytest.raises(BundleSchemaError, match=message) as caught:
        read_manifest(bundle)
    assert str(bundle / MANIFEST) in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"[1]", b"null", b'"x"', b'{"schema_version": 1', b"\xff\xfe", b"\x00" * 64], ids=repr)
def test_no_manifest_at_all(bundle: Path, data: bytes) -> None:
    (bundle / MANIFEST).write_bytes(data)
    with pytest.raises(BundleSchemaError, match=r"is not a valid manifest: .*Export the checkpoint again"):
        read_manifest(bundle)


def test_integrity(bundle: Path) -> None:
    """With verify_integrity=False, a changed byte is not detected, but another size is."""
    path = bundle / "sample-1.fp32.onnx"  # a Generator does not open it
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleIntegrityError, match=r"sample-1\.fp32\.onnx' must have SHA-256 .*, got .*\. The file was changed or damaged"):
        Generator(bundle)
    Generator(bundle, verify_integrity=False).close()
    path.write_bytes(data[:-1])
    for verify in (True, False):
        with pytest.raises(BundleIntegrityError, match=rf"must have {len(data)} bytes, got {len(data) - 1}\."):
            Generator(bundle, verify_integrity=verify)
    path.unlink()
    with pytest.raises(BundleIntegrityError, match=r"lacks the file sample-1\.fp32\.onnx, which its manifest lists"):
        Generator(bundle, verify_integrity=False)


def test_a_file_that_may_not_be_read(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: Any) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("scm_runtime.engines.open_bundle.sha256", refuse)
    with pytest.raises(BundleIntegrityError, match=r"cannot read '.*': Permission denied\. Expected a file that you may read"):
        Generator(tiny_bundle)


def test_an_extra_file_does_no_harm(bundle: Path) -> None:
    (bundle / "README.md").write_text("mine")
    check_files(bundle, read_manifest(bundle))


def test_find_local(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_local(tiny_bundle) == find_local(str(tiny_bundle)) == tiny_bundle
    monkeypatch.setattr("scm_runtime.bundle.location.EMBEDDED", tiny_bundle.parent)
    assert find_local("tiny") == tiny_bundle
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name, wrong in {"file": "is a file", "folder": "has no scm.json", "nothing": "does not exist"}.items():
        with pytest.raises(BundleNotFoundError, match=rf"no bundle at '.*{name}': it {wrong}\. Expected a folder .* the name of an embedded bundle \('tiny'\)"):
            find_local(tmp_path / name)


@pytest.mark.parametrize("name", ["../bundles/digits", "", "a b", "nothing"])
def test_an_unknown_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleNotFoundError, match="no bundle at"):
        find_local(name)


@pytest.fixture
def shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle in the folder ``digits`` of the current folder."""
    monkeypatch.chdir(tmp_path)
    return toy_bundle.write_text_bundle(tmp_path / "digits", name="shadow")


def test_the_name_of_an_embedded_bundle_is_not_a_folder(shadowed: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a command's name does not run a file of the current folder."""
    caplog.set_level(logging.INFO, "scm_runtime")
    embedded = find_local("digits")
    assert read_manifest(embedded).name == "digits"
    assert "'digits' is the embedded bundle. For the folder of that name here: ./digits" in caplog.text
    for path in (Path("digits"), "./digits", str(shadowed), shadowed):
        assert read_manifest(find_local(path)).name == "shadow"


def test_the_command_line_opens_the_embedded_bundle_by_name(shadowed: Path) -> None:
    def inspected(bundle: str) -> Any:
        return json.loads(CliRunner().invoke(main, ["inspect", bundle, "--json"], catch_exceptions=False).stdout)

    assert inspected("digits")["name"] == "digits"
    assert inspected("./digits")["name"] == "shadow"


def test_the_doctor_samples_the_embedded_bundle(shadowed: Path) -> None:
    provider = _try_provider("CPUExecutionProvider", as_device=False)
    assert provider.works, provider.reason
