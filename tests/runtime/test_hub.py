"""Bundles on the Hugging Face hub: from a cache with huggingface_hub's layout, without a network, and from a local server."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

import toy_bundle
from hub_cache import Hub, add_snapshot, commit_of, files_of, serving
from scm_runtime import (
    BundleIntegrityError,
    BundleNotFoundError,
    BundleSchemaError,
    Generator,
    HubError,
    HubNotFoundError,
    InferenceError,
    InvalidArgumentError,
)
from scm_runtime.bundle import hub as scm_hub
from scm_runtime.cli import main
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.ort.native_ops import find_library
from scm_runtime.ort.open_session import open_session
from support import BLOCK_IMPORTS, run_python, tree

constants = pytest.importorskip("huggingface_hub.constants")

EMBEDS = np.random.default_rng(0).standard_normal((3, 7, toy_bundle.WIDTH)).astype(np.float32)
FIRST, SECOND = commit_of("first"), commit_of("second")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two versions of a bundle, by commit: their weights differ."""
    folder = tmp_path_factory.mktemp("bundles")
    return {commit: toy_bundle.write_text_bundle(folder / commit, gain=gain) for commit, gain in ((FIRST, 1.0), (SECOND, 2.0))}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, without a network, and an empty current folder."""
    folder, here = tmp_path / "cache", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture(params=[False, True], ids=["blobs of the repository", "blobs of the whole cache"])
def filled(cache: Path, bundles: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    """The cache with both versions: the branch main is the second, the tag v1 the first."""
    add_snapshot(cache, "org/text", FIRST, files_of(bundles[FIRST]), refs=["v1"], shared=request.param)
    add_snapshot(cache, "org/text", SECOND, files_of(bundles[SECOND]), refs=["main"], shared=request.param)
    return cache


def latents(generator: Generator) -> NDArray[np.float32]:
    array: NDArray[np.float32] = generator(prompt_embeds=EMBEDS, seed=7, output_type="latent").array
    return array


def expected(gain: float) -> NDArray[np.float32]:
    return toy_bundle.sample([7, 8, 9], EMBEDS, gain=gain)


# ----------------------------------------------------------------------------
# From the cache.


@pytest.mark.parametrize(("revision", "gain"), [(None, 2.0), ("main", 2.0), ("v1", 1.0), (FIRST, 1.0), (SECOND, 2.0)])
def test_a_bundle_of_any_revision(filled: Path, revision: str | None, gain: float) -> None:
    before = tree(filled)
    with Generator("org/text", revision=revision) as generator:
        np.testing.assert_allclose(latents(generator), expected(gain), atol=1e-5)
        assert generator.encode(generator.decode(latents(generator), preview=False)).shape == (3, *toy_bundle.SAMPLE_SHAPE)
        assert generator.folder.name == (FIRST if gain == 1 else SECOND)
    assert tree(filled) == before


def test_the_folder_of_a_snapshot_is_a_bundle_too(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = filled / "models--org--text" / "snapshots" / FIRST
    with Generator(folder) as generator:
        np.testing.assert_allclose(latents(generator), expected(1.0), atol=1e-5)
    monkeypatch.chdir(folder)
    with Generator(".") as generator:
        np.testing.assert_allclose(latents(generator), expected(1.0), atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("native_ops", [False, "auto"])
def test_a_bundle_in_the_cache_samples_as_in_a_folder(cache: Path, shared: bool, dtype: Any, native_ops: Any) -> None:
    with Generator("digits", dtype=dtype, native_ops=native_ops) as generator:
        drawn = generator([3, 1, 4], seed=7, output_type="np").array
        add_snapshot(cache, "org/digits", FIRST, files_of(generator.folder), refs=["main"], shared=shared)
    with Generator("org/digits", dtype=dtype, native_ops=native_ops) as generator:
        assert generator.info.native_ops == (native_ops == "auto" and find_library() is not None)
        np.testing.assert_array_equal(generator([3, 1, 4], seed=7, output_type="np").array, drawn)


def test_only_the_files_that_the_dtype_needs(cache: Path, bundles: dict[str, Path]) -> None:
    files = files_of(bundles[FIRST])
    manifest = json.loads(files["scm.json"])
    for name in ("sample-1.fp32.onnx", "step.fp16.onnx"):
        manifest["files"][name] = {"size": 10**12, "sha256": "0" * 64}
    add_snapshot(cache, "org/text", FIRST, {**files, "scm.json": json.dumps(manifest).encode()}, refs=["main"])
    with Generator("org/text") as generator:
        np.testing.assert_allclose(latents(generator), expected(1.0), atol=1e-5)
    with pytest.raises(BundleIntegrityError, match=r"lacks the file s.*, which its manifest lists"):
        Generator(generator.folder)  # a folder must be complete
    shown = CliRunner(catch_exceptions=False).invoke(main, ["inspect", "org/text"])
    assert shown.exit_code == 0
    assert "those fetched so far are unchanged" in shown.stdout


def test_a_path_comes_first(filled: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    here = tmp_path / "here" / "org" / "text"
    shutil.copytree(bundles[FIRST], here)
    with Generator("org/text") as generator:
        np.testing.assert_allclose(latents(generator), expected(1.0), atol=1e-5)
        assert generator.folder == Path("org/text")
    with pytest.raises(InvalidArgumentError, match=r"revision 'main' is for a repository of the hub, 'org/name': 'org/text' exists here"):
        Generator("org/text", revision="main")
    shutil.rmtree(here)
    with pytest.raises(
        BundleNotFoundError,
        match=r"no bundle at 'org/text': .*there is a folder 'org' here\. Give a revision to ask it, for instance 'main'",
    ):
        Generator("org/text")
    with Generator("org/text", revision="main") as generator:
        np.testing.assert_allclose(latents(generator), expected(2.0), atol=1e-5)


@pytest.mark.parametrize(
    "given",
    ["digits.scm", "org/name/more", "org/", "/name", "../text", "org/..", "org\\text", "a--b/c", "-org/name", "org/name.", "org/digits.scm", "o/x.pt", ""],
)
def test_what_is_no_repository_is_a_path(cache: Path, given: str) -> None:
    with pytest.raises(BundleNotFoundError, match="no bundle at"):
        Generator(given)


def test_a_path_object_is_a_path(filled: Path) -> None:
    with pytest.raises(BundleNotFoundError, match="no bundle at 'org/text'"):
        Generator(Path("org/text"))


@pytest.mark.parametrize(("given", "revision"), [("digits", "main"), (Path("org/text"), "main"), ("org/text", "")])
def test_a_revision_of_what_is_no_repository(filled: Path, given: Any, revision: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"revision '.*' is for a repository of the hub, 'org/name'.* Leave the revision out"):
        Generator(given, revision=revision)


@pytest.mark.parametrize(("given", "revision"), [("org/none", None), ("org/text", "v2"), ("org/text", commit_of("third"))])
def test_what_is_not_in_the_cache(filled: Path, given: str, revision: str | None) -> None:
    with pytest.raises(
        HubNotFoundError, match=rf"scm\.json of the repository '{given}'.* is not in the cache '{filled}', and HF_HUB_OFFLINE is set\. Unset it"
    ) as caught:
        Generator(given, revision=revision)
    assert isinstance(caught.value, FileNotFoundError)
    assert f"there is no '{given}' here" in str(caught.value)


def test_a_file_that_is_not_in_the_cache(filled: Path) -> None:
    (filled / "models--org--text" / "snapshots" / SECOND / "step.fp32.onnx").unlink()
    with pytest.raises(HubNotFoundError, match=rf"step\.fp32\.onnx of the repository 'org/text' at revision '{SECOND}' is not in the cache"):
        Generator("org/text")


def test_a_damaged_download(filled: Path) -> None:
    weights = (filled / "models--org--text" / "snapshots" / SECOND / "weights.onnx.data").resolve()
    data = bytearray(weights.read_bytes())
    data[0] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleIntegrityError, match=r"weights\.onnx\.data' must have SHA-256"):
        Generator("org/text")


def test_names_are_checked_before_anything_is_fetched(cache: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_of(bundles[FIRST])
    manifest = json.loads(files["scm.json"])
    manifest["files"]["../../../passwd"] = {"size": 1, "sha256": "0" * 64}
    add_snapshot(cache, "org/text", FIRST, {**files, "scm.json": json.dumps(manifest).encode()}, refs=["main"])
    original, asked = scm_hub.fetch, []

    def spy(repo: str, name: str, *arguments: Any, **keywords: Any) -> Path:
        asked.append(name)
        return original(repo, name, *arguments, **keywords)

    monkeypatch.setattr(scm_hub, "fetch", spy)
    with pytest.raises(BundleSchemaError, match="files must have plain names"):
        Generator("org/text")
    assert asked == ["scm.json"]


# ----------------------------------------------------------------------------
# Links. ONNX Runtime does not follow links out of a bundle's folder, and neither does scm_runtime, except those of the cache.


def test_links_to_other_places_are_not_followed(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Neither in a folder, nor in one named like a cache."""
    secret = tmp_path / "secret"
    secret.write_bytes((bundles[FIRST] / "weights.onnx.data").read_bytes())
    for folder in (tmp_path / "plain", tmp_path / "models--org--text" / "snapshots" / FIRST):
        shutil.copytree(bundles[FIRST], folder)
        (folder / "weights.onnx.data").unlink()
        (folder / "weights.onnx.data").symlink_to(secret)
        with pytest.raises(InferenceError, match=r"weights\.onnx\.data"):
            open_session(folder / "step.fp32.onnx")


def test_weights_behind_a_link_that_onnxruntime_refuses(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime before 1.32 refuses such a link. Here every graph is refused once."""
    ort: Any = load_onnxruntime()
    original, attempts = ort.InferenceSession, []

    def refuse_at_first(path: str, *arguments: Any, **keywords: Any) -> Any:
        attempts.append(Path(path).name)
        if attempts.count(attempts[-1]) == 1:
            raise RuntimeError("External data path escapes model directory")
        return original(path, *arguments, **keywords)

    monkeypatch.setattr(ort, "InferenceSession", refuse_at_first)
    with Generator("org/text", revision="v1") as generator:
        assert attempts == [name for name in ("noise.onnx", "step.fp32.onnx", "decode.fp32.onnx") for _ in range(2)]
        step = generator.folder / "step.fp32.onnx"
        (generator.folder / "weights.onnx.data").unlink()  # the sessions have read it
        np.testing.assert_allclose(latents(generator), expected(1.0), atol=1e-5)
    attempts.clear()
    with pytest.raises(InferenceError, match="escapes model directory"):
        open_session(step)
    assert attempts == ["step.fp32.onnx"], "there is nothing to follow"


@pytest.mark.parametrize("follows", [True, False], ids=["ONNX Runtime follows the link", "ONNX Runtime refuses the link"])
def test_graphs_from_the_hub_are_kept_optimized(follows: bool, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ort: Any = load_onnxruntime()
    original, opened = ort.InferenceSession, []

    def spy(path: str, options: Any, **keywords: Any) -> Any:
        opened.append(Path(path).name)
        if not follows and Path(path).with_name("weights.onnx.data").is_symlink():  # not for a private copy
            raise RuntimeError("External data path escapes model directory")
        return original(path, options, **keywords)

    monkeypatch.setattr(ort, "InferenceSession", spy)
    drawn = []
    for _ in range(2):
        opened.clear()
        with Generator("org/text", revision="v1", cache_dir=tmp_path / "cache") as generator:
            drawn.append(latents(generator))
    assert opened == ["graph.onnx"] * 3
    np.testing.assert_array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize("place", ["blobs", "models--org--text/blobs"])
def test_a_file_of_the_cache_behind_a_link(place: str, tmp_path: Path) -> None:
    link = tmp_path / "models--org--text" / "snapshots" / FIRST / "weights.onnx.data"
    stored = tmp_path / place / "ab" / "abcd"
    for path in (link, stored):
        path.parent.mkdir(parents=True)
    stored.write_bytes(b"weights")
    assert scm_hub.blob(link) is None
    link.symlink_to(stored)
    assert scm_hub.blob(link) == stored
    stored.unlink()
    assert scm_hub.blob(link) is None


# ----------------------------------------------------------------------------
# From a server.

PROGRAM = """
import json, sys, time
from scm_runtime import Generator
from scm_runtime.bundle import hub

time.sleep = lambda seconds: None  # huggingface_hub waits between its attempts

for name, arguments in json.loads(sys.argv[1]):
    try:
        result = {"generator": lambda *given: Generator(given[0], revision=given[1]).folder, "snapshot": hub.snapshot}[name](*arguments)
        answer = ["", str(result)]
    except Exception as error:
        answer = [type(error).__name__, str(error)]
    print("answer", json.dumps(answer))
"""


@pytest.fixture
def remote(bundles: dict[str, Path]) -> Iterator[Hub]:
    hub = Hub()
    hub.add("org/text", FIRST, files_of(bundles[FIRST]) | {"sample-1.fp32.onnx": b"large", "README.md": b"mine"}, refs=["v1"])
    hub.add("org/text", SECOND, files_of(bundles[SECOND]))
    hub.add("org/model", commit_of("model"), {"model_index.json": b"{}", "unet/config.json": b"{}", "unet/weights.bin": b"1", "vae/config.json": b"{}"})
    hub.failures = {"org/gated": (403, "GatedRepo"), "org/hidden": (403, ""), "org/broken": (500, "")}
    with serving(hub):
        yield hub


def ask(hub: Hub, home: Path, *requests: tuple[str, tuple[Any, ...]], **environment: str) -> list[tuple[str, str]]:
    """Run requests in a subprocess with an environment; return the type (empty for success) and text of each answer."""
    home.mkdir(exist_ok=True)
    ours = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = run_python(PROGRAM, json.dumps(requests), cwd=home, env=kept | ours)
    return [tuple(json.loads(line.removeprefix("answer "))) for line in done.stdout.splitlines() if line.startswith("answer ")]


def test_fetching(remote: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    ((error, folder),) = ask(remote, home, ("generator", ("org/text", "v1")))
    assert error == "", folder
    assert Path(folder) == home / "hub" / "models--org--text" / "snapshots" / FIRST
    needed = {"scm.json", "noise.onnx", "step.fp32.onnx", "decode.fp32.onnx", "encode.fp32.onnx", "preview.fp32.onnx", "weights.onnx.data"}
    assert remote.downloaded() == needed

    remote.requests.clear()
    again = ask(remote, home, ("generator", ("org/text", "v1")), ("generator", ("org/text", FIRST)), HF_HUB_OFFLINE="1")
    assert again == [("", folder)] * 2
    assert remote.requests == [], "HF_HUB_OFFLINE must keep the network out"

    ((error, second),) = ask(remote, home, ("generator", ("org/text", None)))
    assert (error, Path(second).name) == ("", SECOND)


def test_what_the_hub_refuses(remote: Hub, tmp_path: Path) -> None:
    cases: dict[tuple[str, str | None], tuple[type[Exception], str]] = {
        ("org/none", None): (HubNotFoundError, "there is no repository 'org/none' on the hub that you may read, and no folder 'org/none' here"),
        ("org/text", "v9"): (HubNotFoundError, "the repository 'org/text' has no revision 'v9'. Give one of its branches, tags or commits"),
        ("org/model", None): (HubNotFoundError, "the repository 'org/model' has no file scm.json. It is not a bundle. To export"),
        ("org/gated", None): (HubError, "the repository 'org/gated' is gated: ask for access on its page, and log in: hf auth login (or set HF_TOKEN)"),
        ("org/hidden", None): (HubError, "If access is restricted, ask for access on its page, and log in"),
        ("org/broken", None): (HubError, "500"),
    }
    answers = ask(remote, tmp_path / "home", *(("generator", request) for request in cases))
    for (expected_type, words), (name, message) in zip(cases.values(), answers, strict=True):
        assert name == expected_type.__name__
        assert words in message


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    nowhere = Hub()
    nowhere.url = "http://127.0.0.1:9"  # nothing listens on the discard port
    ((name, message),) = ask(nowhere, tmp_path / "home", ("generator", ("org/text", None)))
    assert name == "HubError"
    assert "scm.json of the repository 'org/text' is not in the cache and cannot be fetched from the hub" in message
    assert "Check the connection" in message
    assert "there is no 'org/text' here" in message


def test_a_snapshot_of_some_files(remote: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    request = ("snapshot", ("org/model", "main", ["*.json", "unet/*.json"]))
    ((error, folder),) = ask(remote, home, request)
    assert error == "", folder
    assert sorted(files_of(Path(folder))) == ["model_index.json", "unet/config.json", "vae/config.json"]
    assert ask(remote, home, request, HF_HUB_OFFLINE="1") == [("", folder)]
    names = [name for name, _ in ask(remote, home, ("snapshot", ("org/none",)), ("snapshot", ("org/model", "v9")), ("snapshot", ("org/gated",)))]
    assert names == ["HubNotFoundError", "HubNotFoundError", "HubError"]


# ----------------------------------------------------------------------------
# The command line, and what is not installed.


def test_on_the_command_line(filled: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "prompt.npy", EMBEDS)
    runner = CliRunner(catch_exceptions=False)
    for options, gain in (([], 2.0), (["--revision", "v1"], 1.0)):
        out = tmp_path / f"{gain}.png"
        drawn = runner.invoke(main, ["generate", "org/text", *options, "-o", str(out), "--seed", "7", "--prompt-embeds", str(tmp_path / "prompt.npy")])
        assert drawn.exit_code == 0, drawn.output
        shown = runner.invoke(main, ["inspect", "org/text", *options, "--json"])
        assert json.loads(shown.stdout)["name"] == "text"
    assert (tmp_path / "1.0.png").read_bytes() != (tmp_path / "2.0.png").read_bytes()
    assert runner.invoke(main, ["smoke", "org/text", "--revision", "v1"]).exit_code == 0
    for arguments in (["inspect", "org/none"], ["inspect", "org/text", "--revision", "v2"], ["smoke", "digits", "--revision", "v1"]):
        failed = runner.invoke(main, arguments)
        assert failed.exit_code == 2
        assert failed.stderr.startswith("Error: ")


def test_without_huggingface_hub(tmp_path: Path) -> None:
    program = """
Block.error = ModuleNotFoundError
from scm_runtime import Generator, MissingDependencyError

Generator("digits").close()
try:
    Generator("org/text")
except MissingDependencyError as error:
    assert "there is no folder 'org/text' here" in str(error), error
    assert "pip install 'huggingface_hub>=" in str(error), error
else:
    raise AssertionError("no error")
"""
    run_python(BLOCK_IMPORTS + program, "huggingface_hub", cwd=tmp_path)
