"""Attacks that swap a bundle's files while it is opened. A cache entry is never built from other bytes than those in its key.

Otherwise an attacker who can write to one copy of a bundle could put a manipulated graph into the user's cache, under the key of every copy.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import toy_bundle
from scm_runtime import Generator, InferenceError
from scm_runtime.bundle.checksums import ChecksumCache, FileStat, sha256, stat_fingerprint
from scm_runtime.bundle.manifest import WEIGHTS
from scm_runtime.cache.graph_cache import TEMP_PREFIX, GraphCache
from scm_runtime.cache.private_copy import ChangedError, copy_graph
from scm_runtime.ort import open_session as opening

STEP = "step.fp32.onnx"
SEEDS = (7, 8)
EMBEDS = np.random.default_rng(0).standard_normal((len(SEEDS), 3, toy_bundle.WIDTH)).astype(np.float32)


@pytest.fixture
def original_bundle(tmp_path: Path) -> Path:
    return toy_bundle.write_text_bundle(tmp_path / "original_bundle")


@pytest.fixture(params=[STEP, WEIGHTS])
def tampered_bundle(original_bundle: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A manipulated copy with the same manifest and file sizes: its step halves the state twice, or its weights are doubled."""
    folder = shutil.copytree(original_bundle, tmp_path / "tampered_bundle")
    if request.param == STEP:
        graph = (folder / STEP).read_bytes()
        half, quarter = struct.pack("<f", 0.5), struct.pack("<f", 0.25)
        assert graph.count(half) == 1
        (folder / STEP).write_bytes(graph.replace(half, quarter))
    else:
        (folder / WEIGHTS).write_bytes((toy_bundle.weights() * 2).tobytes() + bytes(64))
    return folder


def generate(bundle: Path, cache: Path, *, verify_integrity: bool = True) -> NDArray[np.float32]:
    with Generator(bundle, device="cpu", cache_dir=cache, verify_integrity=verify_integrity) as generator:
        latents: NDArray[np.float32] = generator(prompt_embeds=EMBEDS, seed=SEEDS, output_type="latent").array
    return latents


def is_correct(latents: NDArray[np.float32]) -> bool:
    return np.allclose(latents, toy_bundle.sample(SEEDS, EMBEDS), atol=1e-5)


def exchange(one: Path, other: Path) -> None:
    temporary = one.with_name("temporary")
    one.rename(temporary)
    other.rename(one)
    temporary.rename(other)


def exchange_files(here: Path, there: Path) -> None:
    for name in (STEP, WEIGHTS):
        exchange(here / name, there / name)


swap_files_or_folder = pytest.mark.parametrize("swap", [exchange_files, exchange], ids=["files", "folder"])  # files of a swapped folder keep inodes and times


@contextmanager
def swapped(swap: Callable[[], None], *, back: bool) -> Iterator[None]:
    """Context manager: call ``swap`` when the step graph is looked up in the cache, which is after its key was computed.

    With ``back``, call it again as soon as a graph is opened.
    """
    original, pending = opening.open_cached, [swap, swap] if back else [swap]

    def swapping_open(cache: GraphCache, source: Path, key: str, create: Callable[..., Any], **options: Any) -> Any:
        def swapping_create(path: Path, change: Callable[[Any], None]) -> Any:
            opened = create(path, change)
            if pending and source.name == STEP:
                pending.pop()()
            return opened

        if source.name == STEP:
            pending.pop()()
        return original(cache, source, key, swapping_create, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "open_cached", swapping_open)
        yield
    assert not pending


@swap_files_or_folder
@pytest.mark.parametrize("back", [True, False], ids=["swapped back", "not swapped back"])
def test_swapped_files_leave_nothing_in_the_cache(
    original_bundle: Path, tampered_bundle: Path, tmp_path: Path, swap: Callable[[Path, Path], None], back: bool, caplog: pytest.LogCaptureFixture
) -> None:
    other, cache = shutil.copytree(original_bundle, tmp_path / "other"), tmp_path / "cache"
    with swapped(lambda: swap(original_bundle, tampered_bundle), back=back):
        generate(original_bundle, cache)
    left = {json.loads((entry / "entry.json").read_bytes())["source"] for entry in (cache / "graphs").iterdir()}
    for _ in range(2):
        assert is_correct(generate(other, cache))
    assert left == {"noise.onnx", "decode.fp32.onnx"}
    assert "changed" in caplog.text


@swap_files_or_folder
def test_swapped_files_leave_nothing_in_the_cache_without_integrity_checks(
    original_bundle: Path, tampered_bundle: Path, tmp_path: Path, swap: Callable[[Path, Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    with swapped(lambda: swap(original_bundle, tampered_bundle), back=True):
        generate(original_bundle, tmp_path / "cache", verify_integrity=False)
    for _ in range(2):
        assert is_correct(generate(original_bundle, tmp_path / "cache", verify_integrity=False))
    assert "changed" in caplog.text


@pytest.mark.parametrize("fingerprint", [sha256, stat_fingerprint])
@pytest.mark.parametrize("swap_back_at", [1, 2], ids=["graph is open", "weights are open"])
def test_a_copy_is_correct_or_rejected_whenever_the_folder_is_swapped_back(
    original_bundle: Path, tampered_bundle: Path, tmp_path: Path, fingerprint: Callable[[Path], str], swap_back_at: int
) -> None:
    fingerprints = {file: fingerprint(original_bundle / file) for file in (STEP, WEIGHTS)}
    correct = {file: (original_bundle / file).read_bytes() for file in (STEP, WEIGHTS)}
    copies, calls = tmp_path / "copies", iter((1, 2))

    def has_room(_: int) -> bool:
        if next(calls) == swap_back_at:
            exchange(original_bundle, tampered_bundle)
        return True

    copies.mkdir()
    exchange(original_bundle, tampered_bundle)
    try:
        copy_graph(original_bundle / STEP, copies, fingerprints, has_room)
    except ChangedError:
        return
    assert {file.name: file.read_bytes() for file in copies.iterdir()} == correct


def test_no_checksum_is_cached_if_the_folder_is_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is swapped between the stat of the file and the reading of it."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, contents in ((here, b"bad."), (there, b"good")):
        folder.mkdir()
        (folder / "file").write_bytes(contents)
    (tmp_path / "checksums").mkdir()
    monkeypatch.setattr("scm_runtime.bundle.checksums.SETTLED_NS", 0)
    original, calls = FileStat.of, [0]

    def swapping_stat(*arguments: Any) -> FileStat:
        calls[0] += 1
        if calls[0] == 2:
            exchange(here, there)
        found = original(*arguments)
        if calls[0] == 1:
            exchange(here, there)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(FileStat, "of", swapping_stat)
        ChecksumCache(tmp_path / "checksums").sha256(here / "file")
    assert (here / "file").read_bytes() == b"bad."
    assert ChecksumCache(tmp_path / "checksums").sha256(here / "file") == sha256(here / "file")


def test_weights_behind_a_link_are_not_copied_into_the_cache(original_bundle: Path, tmp_path: Path) -> None:
    secret = (original_bundle / WEIGHTS).rename(tmp_path / "secret")
    (original_bundle / WEIGHTS).symlink_to(secret)
    for _ in range(2):
        with pytest.raises(InferenceError, match="cannot open"):
            generate(original_bundle, tmp_path / "cache", verify_integrity=False)
    assert not list((tmp_path / "cache").glob(f"graphs/{TEMP_PREFIX}*"))
