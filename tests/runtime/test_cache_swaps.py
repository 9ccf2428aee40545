"""Files of a bundle that somebody swaps while it is opened: no cached graph is ever made of other bytes than those that name it.

Whoever can write to one copy of a bundle could otherwise leave a graph of theirs in the reader's cache, under the name of all copies.
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
def honest(tmp_path: Path) -> Path:
    return toy_bundle.write_text_bundle(tmp_path / "honest")


@pytest.fixture(params=[STEP, WEIGHTS])
def evil(honest: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The same bundle, by its manifest and the sizes of its files: but its step halves the state twice, or its weights are twice as large."""
    folder = shutil.copytree(honest, tmp_path / "evil")
    if request.param == STEP:
        graph = (folder / STEP).read_bytes()
        half, quarter = struct.pack("<f", 0.5), struct.pack("<f", 0.25)
        assert graph.count(half) == 1
        (folder / STEP).write_bytes(graph.replace(half, quarter))
    else:
        (folder / WEIGHTS).write_bytes((toy_bundle.weights() * 2).tobytes() + bytes(64))
    return folder


def draw(bundle: Path, cache: Path, *, verify_integrity: bool = True) -> NDArray[np.float32]:
    with Generator(bundle, device="cpu", cache_dir=cache, verify_integrity=verify_integrity) as generator:
        latents: NDArray[np.float32] = generator(prompt_embeds=EMBEDS, seed=SEEDS, output_type="latent").array
    return latents


def is_right(latents: NDArray[np.float32]) -> bool:
    return np.allclose(latents, toy_bundle.sample(SEEDS, EMBEDS), atol=1e-5)


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def exchange_files(here: Path, there: Path) -> None:
    for name in (STEP, WEIGHTS):
        exchange(here / name, there / name)


by_file_and_folder = pytest.mark.parametrize("swap", [exchange_files, exchange], ids=["files", "folder"])  # whose files keep inodes and times


@contextmanager
def swapped(swap: Callable[[], None], *, back: bool) -> Iterator[None]:
    """Within the block: swap when the step's graph is looked for in the cache, so under a name that was made before. Swap back as soon as a graph was
    opened, or, without ``back``, not at all."""
    original, waiting = opening.open_cached, [swap, swap] if back else [swap]

    def watched(cache: GraphCache, source: Path, key: str, create: Callable[..., Any], **options: Any) -> Any:
        def watched_create(path: Path, change: Callable[[Any], None]) -> Any:
            opened = create(path, change)
            if waiting and source.name == STEP:
                waiting.pop()()
            return opened

        if source.name == STEP:
            waiting.pop()()
        return original(cache, source, key, watched_create, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "open_cached", watched)
        yield
    assert not waiting


@by_file_and_folder
@pytest.mark.parametrize("back", [True, False], ids=["and back", "for good"])
def test_swapped_files_leave_nothing_in_the_cache(
    honest: Path, evil: Path, tmp_path: Path, swap: Callable[[Path, Path], None], back: bool, caplog: pytest.LogCaptureFixture
) -> None:
    other, cache = shutil.copytree(honest, tmp_path / "other"), tmp_path / "cache"
    with swapped(lambda: swap(honest, evil), back=back):
        draw(honest, cache)
    left = {json.loads((entry / "entry.json").read_bytes())["source"] for entry in (cache / "graphs").iterdir()}
    for _ in range(2):
        assert is_right(draw(other, cache))
    assert left == {"noise.onnx", "decode.fp32.onnx"}
    assert "changed" in caplog.text


@by_file_and_folder
def test_swapped_files_leave_nothing_in_the_cache_where_sums_are_not_compared(
    honest: Path, evil: Path, tmp_path: Path, swap: Callable[[Path, Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    with swapped(lambda: swap(honest, evil), back=True):
        draw(honest, tmp_path / "cache", verify_integrity=False)
    for _ in range(2):
        assert is_right(draw(honest, tmp_path / "cache", verify_integrity=False))
    assert "changed" in caplog.text


@pytest.mark.parametrize("name", [sha256, stat_fingerprint])
@pytest.mark.parametrize("turn", [1, 2])
def test_a_copy_is_right_or_refused_whenever_the_folder_is_swapped_back(
    honest: Path, evil: Path, tmp_path: Path, name: Callable[[Path], str], turn: int
) -> None:
    """Here as soon as the graph, or the weights, are open."""
    sums = {file: name(honest / file) for file in (STEP, WEIGHTS)}
    right = {file: (honest / file).read_bytes() for file in (STEP, WEIGHTS)}
    copies, turns = tmp_path / "copies", iter((1, 2))

    def has_room(_: int) -> bool:
        if next(turns) == turn:
            exchange(honest, evil)
        return True

    copies.mkdir()
    exchange(honest, evil)
    try:
        copy_graph(honest / STEP, copies, sums, has_room)
    except ChangedError:
        return
    assert {file.name: file.read_bytes() for file in copies.iterdir()} == right


def test_no_sum_is_remembered_of_a_folder_that_was_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking at the file and reading it."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, contents in ((here, b"evil"), (there, b"good")):
        folder.mkdir()
        (folder / "file").write_bytes(contents)
    (tmp_path / "sums").mkdir()
    monkeypatch.setattr("scm_runtime.bundle.checksums.SETTLED_NS", 0)
    look, looks = FileStat.of, [0]

    def watched(*arguments: Any) -> FileStat:
        looks[0] += 1
        if looks[0] == 2:
            exchange(here, there)
        found = look(*arguments)
        if looks[0] == 1:
            exchange(here, there)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(FileStat, "of", watched)
        ChecksumCache(tmp_path / "sums").sha256(here / "file")
    assert (here / "file").read_bytes() == b"evil"
    assert ChecksumCache(tmp_path / "sums").sha256(here / "file") == sha256(here / "file")


def test_weights_behind_a_link_are_not_followed_into_the_cache(honest: Path, tmp_path: Path) -> None:
    secret = (honest / WEIGHTS).rename(tmp_path / "secret")
    (honest / WEIGHTS).symlink_to(secret)
    for _ in range(2):
        with pytest.raises(InferenceError, match="cannot open"):
            draw(honest, tmp_path / "cache", verify_integrity=False)
    assert not list((tmp_path / "cache").glob(f"graphs/{TEMP_PREFIX}*"))
