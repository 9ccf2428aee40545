"""``scm.json`` and ``samplers.json`` from a stranger: each is refused with a typed error, soon and without much memory."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest

import toy_bundle
from scm_runtime import BundleError, BundleNotFoundError, BundleSchemaError, Generator
from scm_runtime.bundle.manifest import COMBINE, MANIFEST, SAMPLERS, Manifest, read_manifest
from scm_runtime.bundle.solver_tables import SolverTables

HUGE = 10**400
TIMEOUT_S = 30


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return toy_bundle.write_text_bundle(tmp_path / "toy.scm")


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    def fail(signum: int, frame: FrameType | None) -> None:
        raise AssertionError("reading the manifest hangs")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(TIMEOUT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = msgspec.json.decode((bundle / MANIFEST).read_bytes())
    change(raw)
    (bundle / MANIFEST).write_bytes(to_json(raw))


def to_json(value: object) -> bytes:
    """Encode to JSON, also integers of any size and floats out of range, which are given as bytes."""
    if isinstance(value, dict):
        return b"{" + b",".join(to_json(key) + b":" + to_json(item) for key, item in value.items()) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(to_json, value)) + b"]"
    if isinstance(value, bytes):
        return value
    return str(value).encode() if type(value) is int else msgspec.json.encode(value)


# ----------------------------------------------------------------------------
# Files.


def test_a_manifest_that_is_a_pipe(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    os.mkfifo(bundle / MANIFEST)
    with pytest.raises(BundleNotFoundError, match=r"scm\.json"):
        Generator(bundle)
    with pytest.raises(BundleNotFoundError, match="must be a regular file"):
        read_manifest(bundle)


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "scm.json"])
def test_a_manifest_that_links_to_a_device_or_itself(bundle: Path, target: str) -> None:
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).symlink_to(target)
    with pytest.raises(BundleNotFoundError):
        read_manifest(bundle)


def test_a_giant_manifest(bundle: Path) -> None:
    os.truncate(bundle / MANIFEST, 100 << 30)  # a sparse file
    with pytest.raises(BundleSchemaError, match=r"scm\.json' is not a valid manifest: it has more than 16777216 bytes"):
        read_manifest(bundle)


@pytest.mark.parametrize("contents", [b"[" * 100_000, b'{"a":' * 100_000, b'{"x":' + b"[" * 500 + b"]" * 500 + b"}"], ids=["list", "dict", "500 levels"])
def test_a_deep_manifest(bundle: Path, contents: bytes) -> None:
    (bundle / MANIFEST).write_bytes(contents)
    with pytest.raises(BundleSchemaError, match="is not a valid manifest"):
        read_manifest(bundle)


# ----------------------------------------------------------------------------
# Values.


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(schema_version=HUGE),
        lambda raw: raw.update(schema_version=-HUGE),
        lambda raw: raw.update(parameters=HUGE),
        lambda raw: raw.update(parameters=10**25),
        lambda raw: raw.update(opset=HUGE),
        lambda raw: raw.update(ops={"scm": HUGE}),
        lambda raw: raw.update(sigma_data=b"1e300"),
        lambda raw: raw.update(sigma_data=HUGE),
        lambda raw: raw.update(initial_scale=b"1e300"),
        lambda raw: raw.update(initial_scale=b"1e999"),
        lambda raw: raw.update(times={"1": [b"1e300", 0.0]}),
        lambda raw: raw.update(times={"1" + "0" * 5000: [1.0, 0.0]}),
        lambda raw: raw.update(times={"1\n": [1.0, 0.0]}),
        lambda raw: raw["sample"].update(shape=[1 << 62]),
        lambda raw: raw["sample"].update(shape=[1 << 16, 1 << 16, 1 << 16]),
        lambda raw: raw["sample"].update(shape=[1] * 100),
        lambda raw: raw["output"].update(shape=[1 << 30, 1 << 30, 3]),
        lambda raw: raw["conditioning"][0].update(shape=["tokens", 1 << 62]),
        lambda raw: raw["conditioning"][0].update(shape=["tokens\n", 5]),
        lambda raw: raw["conditioning"][2].update(default=HUGE),
        lambda raw: raw["conditioning"][2].update(default=b"1e300"),
        lambda raw: raw["conditioning"][2].update(default=b"1e999"),
        lambda raw: raw["conditioning"].append({"name": "labels", "kind": "class", "dtype": "int64", "num_classes": HUGE}),
        lambda raw: raw["conditioning"].append({"name": "labels", "kind": "class", "dtype": "int64", "num_classes": 4, "default": 1 << 70}),
        lambda raw: raw["conditioning"].append({"name": "labels", "kind": "class", "dtype": "int64", "num_classes": 4, "default": 0.5}),
        lambda raw: raw.update(samplers={"heun": [HUGE]}),
        lambda raw: raw.update(composed_steps=[HUGE]),
        lambda raw: raw["files"]["noise.onnx"].update(size=HUGE),
        lambda raw: raw["files"]["noise.onnx"].update(size=b"1e3000"),
        lambda raw: raw["files"]["noise.onnx"].update(sha256="0" * 64 + "\n"),
        lambda raw: raw.update(name=["x"]),
        lambda raw: raw.update(name=b'"\\ud800"'),
        lambda raw: raw.update(conditioning={}),
        lambda raw: raw.update(files=[]),
        lambda raw: raw.update(source=None),
    ],
)
def test_values_of_the_wrong_type_or_out_of_range(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(bundle, change)
    with pytest.raises(BundleSchemaError) as caught:
        Generator(bundle, device="cpu")
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "a\x00b", "a\u202eb", "é" * 200, "x" * 256], ids=ascii)
def test_names_of_files_that_no_file_system_or_terminal_should_see(bundle: Path, name: str) -> None:
    edit(bundle, lambda raw: raw["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(BundleSchemaError, match="files must have plain names inside the bundle's folder") as caught:
        Generator(bundle)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_values_that_are_almost_too_large_are_accepted(bundle: Path) -> None:
    edit(bundle, lambda raw: raw.update(parameters=(1 << 63) - 1, sigma_data=3e38))
    assert read_manifest(bundle).parameters == (1 << 63) - 1


# ----------------------------------------------------------------------------
# Samplers.


def manifest_with_samplers(bundle: Path) -> Manifest:
    def change(raw: dict[str, Any]) -> None:
        raw["samplers"] = {"heun": [1]}
        raw["files"] |= dict.fromkeys((SAMPLERS, COMBINE), raw["files"]["noise.onnx"])

    edit(bundle, change)
    return read_manifest(bundle)


@pytest.mark.parametrize(
    "tables",
    [
        b"[" * 100_000,
        {"heun": {"1": [[b"1e300", 0.0, None]]}},
        {"heun": {"1": [[HUGE, 0.0, None]]}},
        {"heun": {"1": [[1.0, 0.0, None], [1.0, 0.0, [b"1e39", 0.0, 0.0]]]}},
        {"heun": {"1" + "0" * 5000: [[1.0, 0.0, None]]}},
        {"heun": {"one": [[1.0, 0.0, None]]}},
        {"heun": {"1": [[1.0]]}},
        {"heun": {"1": [[1.0, 0.0, [1.0]]]}},
        {"heun": {"1": []}},
        {"heun": []},
        [],
        b"",
    ],
)
def test_sampler_tables(bundle: Path, tables: object) -> None:
    manifest = manifest_with_samplers(bundle)
    (bundle / SAMPLERS).write_bytes(to_json(tables))
    with pytest.raises(BundleSchemaError, match=r"samplers\.json' does not fit the bundle") as caught:
        SolverTables(bundle, manifest).evaluations("heun", 1, None)
    assert len(str(caught.value)) < 1000


def test_sampler_tables_in_a_pipe_or_a_giant_file(bundle: Path) -> None:
    manifest = manifest_with_samplers(bundle)
    os.mkfifo(bundle / SAMPLERS)
    with pytest.raises(BundleError, match="must be a regular file"):
        SolverTables(bundle, manifest).evaluations("heun", 1, None)
    (bundle / SAMPLERS).unlink()
    (bundle / SAMPLERS).touch()
    os.truncate(bundle / SAMPLERS, 100 << 30)
    with pytest.raises(BundleError, match="it has more than 16777216 bytes"):
        SolverTables(bundle, manifest).evaluations("heun", 1, None)
