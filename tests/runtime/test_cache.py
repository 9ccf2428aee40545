"""The cache of optimized graphs and the cache of checksums. Results of a session never depend on either."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import scm_runtime
from scm_runtime.bundle.checksums import ChecksumCache, file_sha256, sha256, stat_fingerprint
from scm_runtime.bundle.manifest import WEIGHTS, read_manifest
from scm_runtime.cache import folder as cache_folder
from scm_runtime.cache import key as cache_key
from scm_runtime.cache.graph_cache import TEMP_PREFIX, GraphCache
from scm_runtime.cache.key import graph_key, is_cacheable
from scm_runtime.common import log
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.errors import InvalidArgumentError, OutOfMemoryError
from scm_runtime.ort.native_ops import find_library
from scm_runtime.ort.open_session import open_cached
from support import full_disk, native_library, run_python, tree

ort = load_onnxruntime()

IMPORTS = ",".join(map(str, (Path(__file__).parents[1], Path(__file__).parent)))  # search path of subprocesses
DIGITS = Path(scm_runtime.__file__).parent / "bundles" / "digits.scm"
NOISE = DIGITS / "noise.onnx"  # small but not trivial, because it has function bodies: 43 kB after optimization
STEP = DIGITS / "step.fp32.onnx"
CHECKSUMS = {name: entry.sha256 for name, entry in read_manifest(DIGITS).files.items()}
PROVIDERS: list[tuple[str, dict[str, str]]] = [("CPUExecutionProvider", {})]

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX owners and modes")


class Opener:
    """Opens graphs for a cache, and records each path, its optimization level, and the names of the files in its folder."""

    def __init__(self, library: Path | None = None) -> None:
        self.library, self.paths = library, list[Path]()
        self.levels: list[object] = []
        self.siblings: list[set[str]] = []

    def __call__(self, path: Path, change: Callable[[Any], None]) -> Any:
        self.paths.append(path)
        self.siblings.append({file.name for file in path.parent.iterdir()})
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if self.library:
            options.register_custom_ops_library(str(self.library))
        change(options)
        self.levels.append(options.graph_optimization_level)
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.fixture(autouse=True)
def _reset_logged_warnings() -> None:
    log._logged.clear()


@pytest.fixture
def cache(tmp_path: Path) -> GraphCache:
    found = GraphCache.locate(tmp_path / "cache")
    assert found is not None
    return found


def key(source: Path = NOISE, **parts: Any) -> str:
    return graph_key(**({"graph": CHECKSUMS[source.name], "weights": CHECKSUMS[WEIGHTS], "providers": PROVIDERS} | parts))


def run(session: Any, n: int = 1) -> NDArray[Any]:
    """Run a session with random inputs of batch size ``n``. Returns its first output."""
    rng = np.random.default_rng(n)
    inputs: dict[str, NDArray[Any]] = {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else n for size in value.shape]
        if value.type == "tensor(int64)":
            inputs[value.name] = rng.integers(0, 9, shape)
        else:
            level = {"t": 1.5, "t_next": 1.1}.get(value.name)
            values = rng.standard_normal(shape) if level is None else np.full(shape, level)
            inputs[value.name] = values.astype(np.float32)
    result: NDArray[Any] = session.run(None, inputs)[0]
    return result


def open_uncached(graph: Path = NOISE, library: Path | None = None) -> Any:
    return Opener(library)(graph, lambda options: None)


def signature(session: Any) -> list[tuple[object, ...]]:
    return [(value.name, value.type, value.shape) for value in (*session.get_inputs(), *session.get_outputs())]


def only_entry(cache: GraphCache) -> Path:
    (entry,) = cache.folder.iterdir()
    return entry


@pytest.mark.parametrize("graph", ["noise.onnx", "step.fp32.onnx", "step.fp16.onnx", "decode.fp32.onnx"])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])
def test_cached_graphs_compute_the_same_bits(cache: GraphCache, graph: str, kernels: bool) -> None:
    library, source = native_library() if kernels else None, DIGITS / graph
    expected = open_uncached(source, library)
    for _ in range(2):
        session = open_cached(cache, source, key(source), Opener(library), checksums=CHECKSUMS)
        assert signature(session) == signature(expected)
        for n in (1, 4):
            assert run(session, n).tobytes() == run(expected, n).tobytes()


def test_a_cached_graph_opens_without_the_bundle_and_without_optimization(cache: GraphCache) -> None:
    first, second = Opener(), Opener()
    open_cached(cache, NOISE, key(), first, checksums=CHECKSUMS)
    session = open_cached(cache, Path("nowhere") / NOISE.name, key(), second, checksums=CHECKSUMS)
    assert first.paths[0].name == NOISE.name
    assert second.paths == [cache.folder / key() / "graph.onnx"]
    assert second.levels == [ort.GraphOptimizationLevel.ORT_DISABLE_ALL]
    assert run(session).tobytes() == run(open_uncached()).tobytes()


def test_other_processes_use_the_entry(cache: GraphCache) -> None:
    open_cached(cache, NOISE, key(), Opener(), checksums=CHECKSUMS)
    before = tree(cache.folder)
    opened = run_python(
        "import sys; sys.path[:0] = sys.argv[1].split(',')\n"
        "from test_cache import *\n"
        "opener = Opener(); open_cached(GraphCache.locate(sys.argv[2]), NOISE, key(), opener, checksums=CHECKSUMS); print(opener.paths)",
        IMPORTS,
        cache.folder.parent,
    )
    assert str(cache.folder / key()) in opened.stdout
    assert "noise" not in opened.stdout
    assert tree(cache.folder) == before


@pytest.mark.parametrize(("graph", "siblings"), [(NOISE, {NOISE.name}), (STEP, {STEP.name, WEIGHTS})], ids=["no weights", "weights"])
def test_an_entry_is_built_from_a_private_copy_that_is_removed_afterwards(cache: GraphCache, graph: Path, siblings: set[str]) -> None:
    """The copy includes the weights file if the graph refers to it."""
    opener = Opener()
    open_cached(cache, graph, key(graph), opener, checksums=CHECKSUMS)
    assert opener.siblings[0] == siblings
    assert opener.paths[0].parent.parent == cache.folder
    assert only_entry(cache).name == key(graph)


@posix
def test_a_named_pipe_instead_of_a_file_does_not_block(cache: GraphCache, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NOISE.name)
    with pytest.raises(ZeroDivisionError):
        open_cached(cache, tmp_path / NOISE.name, key(), lambda *_: 1 / 0, checksums=CHECKSUMS)
    assert not list(cache.folder.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="/proc lists the mapped files")
def test_cached_weights_are_memory_mapped(cache: GraphCache) -> None:
    session = open_cached(cache, STEP, key(STEP), Opener(), checksums=CHECKSUMS)
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(cache.folder / key(STEP) / "graph.data"))]
    sizes = [int(span.split("-")[1], 16) - int(span.split("-")[0], 16) for span, *_ in mapped]
    assert sum(sizes) > 0.8 * (cache.folder / key(STEP) / "graph.data").stat().st_size
    del session


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _replace_with_link(path: Path) -> None:
    """Move a file or folder out of the cache and put a link to it there."""
    elsewhere = next(parent for parent in path.parents if parent.name == "graphs").parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def _replace_with_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "weights changed": lambda entry: _flip(entry / "graph.data"),
    "weights truncated": lambda entry: os.truncate(entry / "graph.data", 1000),
    "weights missing": lambda entry: (entry / "graph.data").unlink(),
    "weights a link": lambda entry: _replace_with_link(entry / "graph.data"),
    "graph changed": lambda entry: _flip(entry / "graph.onnx"),
    "graph truncated": lambda entry: os.truncate(entry / "graph.onnx", 100),
    "graph a link": lambda entry: _replace_with_link(entry / "graph.onnx"),
    "json invalid": lambda entry: (entry / "entry.json").write_text("{"),
    "json of another schema": lambda entry: (entry / "entry.json").write_text('{"source": 3}'),
    "json names other files": lambda entry: (entry / "entry.json").write_text('{"source": "x", "files": {"../../x": {"size": 1, "sha256": ""}}}'),
    "json names no files": lambda entry: (entry / "entry.json").write_text('{"source": "x"}'),
    "json a link": lambda entry: _replace_with_link(entry / "entry.json"),
    "json missing": lambda entry: (entry / "entry.json").unlink(),
    "entry a link": lambda entry: _replace_with_link(entry),
    "entry a file": lambda entry: (entry.rename(entry.parents[1] / "elsewhere"), entry.write_text("")),
    "json deep": lambda entry: (entry / "entry.json").write_bytes(b'{"x":' + b"[" * 100_000),
    "json large": lambda entry: os.truncate(entry / "entry.json", 10 << 30),  # a sparse file
    "json with a large number": lambda entry: (entry / "entry.json").write_bytes(b'{"source": "x", "files": {"graph.onnx": {"size": 1' + b"0" * 400 + b"}}}"),
}
if sys.platform != "win32":
    DAMAGE |= {
        "entry writable by others": lambda entry: entry.chmod(0o777),
        "entry writable by the group": lambda entry: entry.chmod(0o770),
        "weights writable by others": lambda entry: (entry / "graph.data").chmod(0o606),
        "graph writable by the group": lambda entry: (entry / "graph.onnx").chmod(0o660),
        "json writable by others": lambda entry: (entry / "entry.json").chmod(0o666),
        "graph a pipe": lambda entry: _replace_with_pipe(entry / "graph.onnx"),
        "json a pipe": lambda entry: _replace_with_pipe(entry / "entry.json"),
    }
    if os.geteuid() == 0:
        DAMAGE |= {
            "entry of another user": lambda entry: os.chown(entry, 12345, -1),
            "weights of another user": lambda entry: os.chown(entry / "graph.data", 12345, -1),
            "graph of another user": lambda entry: os.chown(entry / "graph.onnx", 12345, -1),
            "json of another user": lambda entry: os.chown(entry / "entry.json", 12345, -1),
        }


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_entries_are_rebuilt(cache: GraphCache, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture) -> None:
    open_cached(cache, NOISE, key(), Opener(), checksums=CHECKSUMS)
    whole = sizes(only_entry(cache))
    damage(cache.folder / key())
    opener = Opener()
    session = open_cached(cache, NOISE, key(), opener, checksums=CHECKSUMS)
    assert run(session).tobytes() == run(open_uncached()).tobytes()
    assert opener.paths[0].name == NOISE.name
    assert "cannot be used and is rebuilt" in caplog.text
    assert not (cache.folder / key()).is_symlink()
    assert sizes(only_entry(cache)) == whole


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.lstat().st_size for path in folder.iterdir()}


def test_links_are_removed_and_their_targets_kept(cache: GraphCache, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "entry.json").write_text("keep")
    (cache.folder / key()).symlink_to(target)
    open_cached(cache, NOISE, key(), Opener(), checksums=CHECKSUMS)
    assert tree(target) == {"entry.json": b"keep"}


def test_without_verification_only_sizes_are_compared(cache: GraphCache) -> None:
    open_cached(cache, NOISE, key(), Opener(), checksums=CHECKSUMS)
    _flip(cache.folder / key() / "graph.data")
    assert cache.find(key(), verify=False) == cache.folder / key() / "graph.onnx"
    assert cache.find(key()) is None


def test_an_entry_that_is_removed_while_it_is_opened(cache: GraphCache) -> None:
    open_cached(cache, NOISE, key(), Opener(), checksums=CHECKSUMS)
    opener = Opener()

    def build(path: Path, change: Callable[[Any], None]) -> Any:
        if path.name != NOISE.name:
            shutil.rmtree(cache.folder / key())
        return opener(path, change)

    assert run(open_cached(cache, NOISE, key(), build, checksums=CHECKSUMS)).tobytes() == run(open_uncached()).tobytes()
    assert not list(cache.folder.iterdir())  # and is not marked as uncacheable


def test_open_sessions_outlive_their_entry(cache: GraphCache) -> None:
    session = open_cached(cache, NOISE, key(), Opener(), checksums=CHECKSUMS)
    shutil.rmtree(cache.folder / key())
    assert not list(cache.folder.iterdir())
    assert run(session).tobytes() == run(open_uncached()).tobytes()


@pytest.mark.parametrize("when", ["saved", "opened again"])
def test_an_uncacheable_graph_is_opened_without_the_cache_and_remembered(cache: GraphCache, when: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "scm_runtime")
    opener = Opener()

    def build(path: Path, change: Callable[[Any], None]) -> Any:
        session = opener(path, change)
        options = ort.SessionOptions()
        change(options)
        if options.optimized_model_filepath if when == "saved" else path.name != NOISE.name:
            raise RuntimeError("Unable to serialize model as it contains compiled nodes. Please disable …")
        return session

    assert run(open_cached(cache, NOISE, key(), build, checksums=CHECKSUMS)).tobytes() == run(open_uncached()).tobytes()
    assert "compiled nodes" in caplog.text
    opener.paths.clear()
    open_cached(cache, NOISE, key(), build, checksums=CHECKSUMS)
    assert opener.paths == [NOISE]
    os.utime(cache.folder / key() / "entry.json", (0, 0))  # old, so that it is tried again
    opener.paths.clear()
    open_cached(cache, NOISE, key(), opener, checksums=CHECKSUMS)
    assert [path.name for path in opener.paths] == [NOISE.name, "graph.onnx"]


def test_a_graph_that_did_not_fit_into_memory_stays_cacheable(cache: GraphCache) -> None:
    open_cached(cache, NOISE, key(), Opener(), checksums=CHECKSUMS)

    def fail_once(path: Path, change: Callable[[Any], None]) -> Any:
        if path.name == "graph.onnx":
            raise OutOfMemoryError("full")
        return Opener()(path, change)

    with pytest.raises(OutOfMemoryError):
        open_cached(cache, NOISE, key(), fail_once, checksums=CHECKSUMS)
    assert not cache.is_uncacheable(key())


def test_a_broken_graph_raises_and_logs_nothing(cache: GraphCache, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = tmp_path / "noise.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(Exception, match=r"noise\.onnx failed"):
        open_cached(cache, broken, key(), Opener(), checksums={broken.name: sha256(broken)})
    assert not caplog.records
    assert not list(cache.folder.iterdir())


@pytest.mark.parametrize("room", [100, 10_000, 20_000])
def test_full_disk(cache: GraphCache, room: int, caplog: pytest.LogCaptureFixture) -> None:
    with full_disk(room):
        session = open_cached(cache, NOISE, key(), Opener(), checksums=CHECKSUMS)
        open_cached(cache, NOISE, key(), Opener(), checksums=CHECKSUMS)
    assert run(session).tobytes() == run(open_uncached()).tobytes()
    assert not list(cache.folder.iterdir())
    assert len(caplog.records) == 1
    open_cached(cache, NOISE, key(), Opener(), checksums=CHECKSUMS)
    assert only_entry(cache)


def test_nothing_is_written_if_the_disk_is_nearly_full(cache: GraphCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"total": 100 << 30, "free": 4 << 30}))
    opener = Opener()
    open_cached(cache, NOISE, key(), opener, checksums=CHECKSUMS)
    assert opener.paths == [NOISE]
    assert not list(cache.folder.iterdir())


def test_a_graph_larger_than_max_bytes_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCM_CACHE_MAX_BYTES", "10000")
    cache = GraphCache.locate(tmp_path / "cache")
    assert cache is not None
    open_cached(cache, NOISE, key(), Opener(), checksums=CHECKSUMS)
    opener = Opener()
    open_cached(cache, NOISE, key(), opener, checksums=CHECKSUMS)
    assert opener.paths == [NOISE]
    assert sum(path.stat().st_size for path in cache.folder.rglob("*") if path.is_file()) < 1000


def test_the_least_recently_used_entry_is_evicted_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCM_CACHE_MAX_BYTES", "100000")  # room for two entries
    cache = GraphCache.locate(tmp_path / "cache")
    assert cache is not None
    names = [key(device=device) for device in "abc"]
    for age, name in ((100, names[0]), (200, names[1])):
        open_cached(cache, NOISE, name, Opener(), checksums=CHECKSUMS)
        os.utime(cache.folder / name / "entry.json", (0, time.time() - age))
    open_cached(cache, NOISE, names[1], Opener(), checksums=CHECKSUMS)  # now the other one is the least recently used
    open_cached(cache, NOISE, names[2], Opener(), checksums=CHECKSUMS)
    assert {path.name for path in cache.folder.iterdir()} == {names[1], names[2]}


def leave_parts(cache: GraphCache) -> Path:
    """Leave an old and a young unfinished entry in the cache, and return the young one."""
    old, young = cache.folder / f"{TEMP_PREFIX}1", cache.folder / f"{TEMP_PREFIX}2"
    for part in (old, young):
        part.mkdir()
        (part / "graph.data").write_bytes(b"half")
    os.utime(old, (0, 0))
    return young


def test_files_of_killed_processes_and_of_older_versions_are_removed(cache: GraphCache) -> None:
    young = leave_parts(cache)
    open_cached(cache, NOISE, key(device="before"), Opener(), checksums=CHECKSUMS)
    os.utime(cache.folder / key(device="before") / "entry.json", (0, 0))
    open_cached(cache, NOISE, key(), Opener(), checksums=CHECKSUMS)
    assert {path.name for path in cache.folder.iterdir()} == {young.name, key()}


def test_files_of_killed_processes_are_removed_when_the_cache_is_opened(cache: GraphCache) -> None:
    young = leave_parts(cache)
    GraphCache.locate(cache.folder.parent)
    assert list(cache.folder.iterdir()) == [young]


@posix
@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_entries_are_writable_by_the_user_only(cache: GraphCache, mask: int, caplog: pytest.LogCaptureFixture) -> None:
    previous = os.umask(mask)
    try:
        open_cached(cache, STEP, key(STEP), Opener(), checksums=CHECKSUMS)
        cache.checksums.remember(STEP, CHECKSUMS[STEP.name])
    finally:
        os.umask(previous)
    assert {path.lstat().st_mode & 0o022 for path in cache.folder.parent.rglob("*")} == {0}
    opener = Opener()
    open_cached(cache, STEP, key(STEP), opener, checksums=CHECKSUMS)
    assert opener.paths == [cache.folder / key(STEP) / "graph.onnx"]
    assert not caplog.records


def test_threads_that_build_the_same_entry(cache: GraphCache, caplog: pytest.LogCaptureFixture) -> None:
    sessions: list[Any] = []
    together = threading.Barrier(4, timeout=60)

    def build(path: Path, change: Callable[[Any], None]) -> Any:
        session = Opener()(path, change)
        if path.name == NOISE.name:
            together.wait()  # all threads have missed the cache, and none has added its entry
        return session

    threads = [threading.Thread(target=lambda: sessions.append(open_cached(cache, NOISE, key(), build, checksums=CHECKSUMS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = run(open_uncached()).tobytes()
    assert [run(session).tobytes() for session in sessions] == [expected] * 4
    assert only_entry(cache).name == key()
    assert not caplog.records  # a thread that comes second is not an error


def test_processes_that_build_and_evict_concurrently(tmp_path: Path) -> None:
    program = """
import sys; sys.path[:0] = sys.argv[1].split(",")
from test_cache import *
os.environ["SCM_CACHE_MAX_BYTES"] = "60000"  # room for one entry
cache, expected = GraphCache.locate(sys.argv[2]), run(open_uncached()).tobytes()
for turn in range(6):
    assert run(open_cached(cache, NOISE, key(device=str(turn % 2)), Opener(), checksums=CHECKSUMS)).tobytes() == expected
"""
    command = [sys.executable, "-c", program, IMPORTS, str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [(process.communicate()[1], process.returncode) for process in running] == [("", 0)] * 3
    assert not list((tmp_path / "cache" / "graphs").glob(f"{TEMP_PREFIX}*"))


def test_the_key_depends_on_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[dict[str, Any]] = [
        {},
        {"graph": "0" * 64},
        {"weights": "0" * 64},
        {"providers": [("CUDAExecutionProvider", {}), ("CPUExecutionProvider", {})]},
        {"providers": [("CUDAExecutionProvider", {"device_id": "1"}), ("CPUExecutionProvider", {})]},
        {"providers": [("CPUExecutionProvider", {}), ("CUDAExecutionProvider", {})]},
        {"device": "NVIDIA L4 8.9"},
        {"library": "0" * 64},
        {"session_options": {"graph_optimization_level": 1}},
        {"session_options": {"graph_optimization_level": 2}},
        {"session_options": {"session.disable_aot_function_inlining": "1"}},
        {"disabled_optimizers": ("NchwcTransformer",)},
    ]
    keys = [key(**part) for part in parts]
    monkeypatch.setattr(ort, "__version__", "1.99.0")
    keys.append(key())
    monkeypatch.setattr(cache_key, "_cpu", lambda: "other")
    keys.append(key())
    monkeypatch.setattr(cache_key, "FORMAT", 99)
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert all(len(name) == 64 for name in keys)


def test_the_key_does_not_depend_on_the_order_of_options(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key(session_options={"a.b": "1", "c.d": "2"}) == key(session_options={"c.d": "2", "a.b": "1"})
    assert key(disabled_optimizers=("A", "B")) == key(disabled_optimizers=("B", "A"))


@pytest.mark.parametrize(
    "name", ["optimized_model_filepath", "enable_profiling", "ep.context_enable", "session.save_model_format", "session.load_model_format"]
)
def test_session_options_that_disable_the_cache(name: str) -> None:
    assert not is_cacheable({"intra_op_num_threads": 1, name: "1"})
    assert is_cacheable({"intra_op_num_threads": 1})


@pytest.mark.parametrize("how", ["SCM_CACHE_DIR", "argument", "XDG_CACHE_HOME", "home"])
def test_location_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("SCM_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if how in ("SCM_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(how, str(tmp_path / how))
    found = GraphCache.locate(tmp_path / "given" if how == "argument" else None)
    expected = {"SCM_CACHE_DIR": "SCM_CACHE_DIR", "argument": "given", "XDG_CACHE_HOME": "XDG_CACHE_HOME/scm-runtime", "home": "home/.cache/scm-runtime"}
    assert found is not None
    assert found.folder.parent == tmp_path / expected[how]
    if sys.platform != "win32":
        assert {path.stat().st_mode & 0o777 for path in (found.folder.parent, *found.folder.parent.iterdir())} == {0o700}


def test_ways_to_disable_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SCM_CACHE_DIR", str(tmp_path / "cache"))
    assert GraphCache.locate(False) is None
    monkeypatch.setenv("SCM_CACHE_MAX_BYTES", "0")
    assert GraphCache.locate() is None
    monkeypatch.delenv("SCM_CACHE_MAX_BYTES")
    monkeypatch.setenv("SCM_CACHE_DIR", "")
    assert GraphCache.locate() is None
    assert not list(tmp_path.iterdir())
    assert not caplog.records


@pytest.mark.parametrize("value", ["4 GB", "-1", "1e9", "²"])
def test_max_bytes_must_be_an_integer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SCM_CACHE_MAX_BYTES", value)
    with pytest.raises(InvalidArgumentError, match=f"SCM_CACHE_MAX_BYTES must be .*{value}"):
        GraphCache.locate(tmp_path)


def test_a_folder_that_cannot_be_created(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    for _ in range(2):
        assert GraphCache.locate(tmp_path / "file" / "cache") is None
    assert len(caplog.records) == 1
    assert "SCM_CACHE_DIR" in caplog.text


def test_a_default_folder_that_cannot_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("SCM_CACHE_DIR", raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setattr(cache_folder, "_platform_folder", lambda: tmp_path / "file" / "cache")
    caplog.set_level(logging.INFO, "scm_runtime")
    assert GraphCache.locate() is None
    assert [record.levelno for record in caplog.records] == [logging.INFO]  # not a warning, because the user did not request this folder


@posix
@pytest.mark.parametrize("part", ["", "graphs", "verified"])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to_is_rejected(tmp_path: Path, part: str, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    assert GraphCache.locate(tmp_path / "cache")
    (tmp_path / "cache" / part).chmod(mode)
    assert GraphCache.locate(tmp_path / "cache") is None
    assert "must not be writable by other users" in caplog.text


@posix
def test_a_shared_folder_with_the_sticky_bit_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    assert GraphCache.locate(tmp_path / "tmp")


@posix
def test_a_folder_of_another_user_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    if os.geteuid() == 0:
        os.chown(tmp_path / "cache", 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert GraphCache.locate(tmp_path / "cache") is None
    assert "must be owned by" in caplog.text


@posix
def test_subfolders_that_are_links_are_rejected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache" / "graphs").symlink_to(tmp_path / "elsewhere")
    assert GraphCache.locate(tmp_path / "cache") is None
    assert "must be a folder" in caplog.text


@posix
def test_a_read_only_folder_is_read_and_not_written(cache: GraphCache, caplog: pytest.LogCaptureFixture) -> None:
    open_cached(cache, NOISE, key(), Opener(), checksums=CHECKSUMS)
    cache.folder.chmod(0o500)
    if os.access(cache.folder, os.W_OK):
        pytest.skip("root can write to every folder")
    opener = Opener()
    open_cached(cache, NOISE, key(), opener, checksums=CHECKSUMS)
    assert opener.paths == [cache.folder / key() / "graph.onnx"]
    for device in "ab":
        open_cached(cache, NOISE, key(device=device), opener, checksums=CHECKSUMS)
    assert len(caplog.records) == 1
    cache.folder.chmod(0o700)


def test_the_key_depends_on_the_checksum_of_the_native_library(cache: GraphCache) -> None:
    found = find_library()
    if found is not None:
        assert key(library=cache.checksums.sha256(found.path)) != key()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    os.utime(path, (1, 1))
    return path


@pytest.fixture
def checksum_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ChecksumCache:
    (tmp_path / "checksums").mkdir()
    monkeypatch.setattr("scm_runtime.bundle.checksums.SETTLED_NS", 0)
    return ChecksumCache(tmp_path / "checksums")


@posix
@pytest.mark.parametrize("change", [lambda entry: entry.chmod(0o666), lambda entry: os.chown(entry, 12345, -1)], ids=["writable by others", "of another user"])
def test_a_cached_checksum_that_others_could_have_written_is_not_used(checksum_cache: ChecksumCache, file: Path, change: Callable[[Path], None]) -> None:
    checksum_cache.remember(file, "0" * 64)
    assert checksum_cache.sha256(file) == "0" * 64
    (entry,) = (file.parent / "checksums").iterdir()
    try:
        change(entry)
    except PermissionError:
        pytest.skip("only root can give a file away")
    assert checksum_cache.sha256(file) == sha256(file)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Checksums that were computed by reading a file, in order."""
    digests: list[str] = []

    def recording_sha256(file: BufferedReader, between_chunks: Callable[[], None] | None = None) -> str:
        digests.append(file_sha256(file, between_chunks))
        return digests[-1]

    monkeypatch.setattr("scm_runtime.bundle.checksums.file_sha256", recording_sha256)
    return digests


def test_an_unchanged_file_is_hashed_once(checksum_cache: ChecksumCache, file: Path, computed: list[str]) -> None:
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert [checksum_cache.sha256(file) for _ in range(3)] == [expected] * 3
    assert computed == [expected]


@pytest.mark.parametrize("change", ["written in place, times restored", "replaced", "another path"])
def test_a_changed_file_is_hashed_again(checksum_cache: ChecksumCache, file: Path, change: str) -> None:
    checksum_cache.sha256(file)
    if change == "another path":
        file = file.rename(file.with_name("moved"))
        file.write_bytes(b"changes")
    elif change == "replaced":
        file.with_name("new").write_bytes(b"changes")
        file.with_name("new").replace(file)
    else:
        file.write_bytes(b"changes")
    os.utime(file, (1, 1))
    assert checksum_cache.sha256(file) == sha256(file)


def test_the_checksum_of_a_file_written_just_now_is_not_cached(
    checksum_cache: ChecksumCache, file: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scm_runtime.bundle.checksums.SETTLED_NS", 60_000_000_000)
    for _ in range(2):
        checksum_cache.sha256(file)
    assert computed == [hashlib.sha256(file.read_bytes()).hexdigest()] * 2


def test_cached_checksums_expire(checksum_cache: ChecksumCache, file: Path, computed: list[str], tmp_path: Path) -> None:
    checksum_cache.sha256(file)
    (cached,) = (tmp_path / "checksums").iterdir()
    os.utime(cached, (0, 0))
    checksum_cache.sha256(file)
    assert computed == [hashlib.sha256(file.read_bytes()).hexdigest()] * 2
    os.utime(cached, (0, 0))
    checksum_cache.prune()
    assert not list((tmp_path / "checksums").iterdir())


@pytest.mark.parametrize("text", ["", "{", '{"seen": 3, "sha256": "x"}'])
def test_a_damaged_cached_checksum_is_replaced(checksum_cache: ChecksumCache, file: Path, tmp_path: Path, text: str) -> None:
    checksum_cache.sha256(file)
    (cached,) = (tmp_path / "checksums").iterdir()
    cached.write_text(text)
    assert checksum_cache.sha256(file) == sha256(file)
    assert json.loads(cached.read_text())["sha256"] == sha256(file)


def test_a_checksum_cache_that_cannot_be_written(file: Path) -> None:
    assert ChecksumCache(file / "checksums").sha256(file) == sha256(file)


def test_the_stat_fingerprint_changes_with_the_file(file: Path, computed: list[str]) -> None:
    before = stat_fingerprint(file)
    assert stat_fingerprint(file) == before
    file.write_bytes(b"changes")
    os.utime(file, (1, 1))
    assert stat_fingerprint(file) != before
    assert not computed


def test_the_checksum_of_a_missing_file(checksum_cache: ChecksumCache, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checksum_cache.sha256(tmp_path / "missing")
