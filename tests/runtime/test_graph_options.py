"""How graphs are opened on CUDA: by what they hold and their dtype, and in another way if ONNX Runtime refuses one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import scm_runtime
from runtime.fake_cuda import PLACEMENT, Machine
from scm_runtime.bundle.manifest import WEIGHTS, Dtype, read_manifest
from scm_runtime.cache.graph_cache import GraphCache
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.devices.placement import CPU, Placement
from scm_runtime.engines.cuda import graph_options
from scm_runtime.engines.cuda import stream as cuda
from scm_runtime.engines.cuda.graph_options import ways_to_open
from scm_runtime.engines.cuda.open_engine import open_cuda_engine
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.errors import InferenceError, InvalidArgumentError, OutOfMemoryError
from scm_runtime.ort.open_session import _key
from scm_runtime.ort.options import CONVOLUTION, CacheContext, SessionSettings, configure
from scm_runtime.ort.session import Session

DIGITS = Path(scm_runtime.__file__).parent / "bundles" / "digits.scm"
OLD, NEW = b"... scm.channels_last ...", b"... scm.channels_last ... scm.fused ..."
WITH_LIBRARY = SessionSettings(PLACEMENT, library=Path("libscm_ops.so"))
Refuse = Callable[[Path, SessionSettings], Exception | None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(cuda, "_import_cuda", made.modules)
    monkeypatch.setattr(graph_options, "_domains", lambda path: {graph_options.CHANNELS_LAST, graph_options.FUSED})
    return made


def ways(folder: Path, name: str, contents: bytes, settings: SessionSettings = WITH_LIBRARY) -> list[str]:
    """Return the ways to open a graph, each as the convolution and the layout."""
    (folder / name).write_bytes(contents)
    found = ways_to_open(folder / name, settings)
    half = ".fp16." in name or ".bf16." in name
    assert all(way.provider_options["use_tf32"] == ("1" if half else "0") for way in found)  # without it, fp16 convolutions would have no tensor cores
    return [way.convolution + (" NHWC" if way.provider_options.get("prefer_nhwc") == "1" else "") for way in found]


@pytest.mark.parametrize(
    ("name", "contents", "expected"),
    [
        ("step.fp16.onnx", NEW, ["own NHWC", "own", "cudnn NHWC", "cudnn"]),
        ("step.fp16.onnx", OLD, ["own", "cudnn"]),  # computes sizes, which would be copied between the devices
        ("step.bf16.onnx", NEW, ["own", "cudnn"]),  # bfloat16 has no channels-last kernels
        ("step.bf16.onnx", OLD, ["own", "cudnn"]),
        ("step.fp32.onnx", NEW, ["cudnn"]),
        ("decode.fp16.onnx", b"... scm.channels_first ...", ["cudnn"]),
        ("noise.onnx", NEW, ["cudnn"]),
        ("step.fp16.onnx", b"", ["cudnn"]),
    ],
)
def test_ways_by_what_a_graph_holds_and_its_dtype(tmp_path: Path, name: str, contents: bytes, expected: list[str]) -> None:
    assert ways(tmp_path, name, contents) == expected


def test_own_kernels_need_the_library(tmp_path: Path) -> None:
    assert ways(tmp_path, "step.fp16.onnx", NEW, SessionSettings(PLACEMENT)) == ["cudnn NHWC", "cudnn"]


@pytest.mark.parametrize(("chosen", "expected"), [("own", ["own NHWC", "own"]), ("cudnn", ["cudnn NHWC", "cudnn"])])
def test_the_users_choice_is_the_only_one(tmp_path: Path, chosen: str, expected: list[str]) -> None:
    assert ways(tmp_path, "step.fp16.onnx", NEW, replace(WITH_LIBRARY, session_options={CONVOLUTION: chosen})) == expected


@pytest.mark.parametrize(("name", "contents"), [("step.fp32.onnx", NEW), ("decode.fp16.onnx", b"... scm.channels_first ..."), ("noise.onnx", NEW)])
def test_the_users_choice_of_own_kernels_leaves_graphs_without_such_kernels_alone(tmp_path: Path, name: str, contents: bytes) -> None:
    assert ways(tmp_path, name, contents, replace(WITH_LIBRARY, session_options={CONVOLUTION: "own"})) == ["cudnn"]


def test_a_choice_that_does_not_exist(tmp_path: Path) -> None:
    settings = replace(WITH_LIBRARY, session_options={CONVOLUTION: "fast"})
    for check in (lambda: ways(tmp_path, "step.fp16.onnx", NEW, settings), lambda: configure(load_onnxruntime().SessionOptions(), settings, "step")):
        with pytest.raises(InvalidArgumentError, match=r"scm\.convolution must be own or cudnn, got 'fast'"):
            check()


def test_a_missing_file_is_reported_by_the_session(tmp_path: Path) -> None:
    assert [way.convolution for way in ways_to_open(tmp_path / "step.fp16.onnx", WITH_LIBRARY)] == ["cudnn"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (replace(WITH_LIBRARY, convolution="own"), "own"),
        (replace(WITH_LIBRARY, convolution="own", session_options={CONVOLUTION: "cudnn"}), "cudnn"),
        (WITH_LIBRARY, "cudnn"),
        (SessionSettings(PLACEMENT, convolution="own"), ""),  # the library would read it
        (SessionSettings(CPU, library=Path("libscm_ops.so"), convolution="own"), ""),  # the kernels are for CUDA
    ],
)
def test_the_entry_of_the_session(settings: SessionSettings, expected: str) -> None:
    options = load_onnxruntime().SessionOptions()
    configure(options, settings, "step")
    try:
        found = options.get_session_config_entry(CONVOLUTION)
    except RuntimeError:  # ONNX Runtime's answer if the entry is not set
        found = ""
    assert found == expected


def test_optimized_graphs_are_cached_by_the_choice(tmp_path: Path) -> None:
    context = CacheContext(GraphCache(tmp_path, 1), {"step.fp16.onnx": "1", WEIGHTS: "2"}, "3")
    keys = {_key(Path("step.fp16.onnx"), replace(WITH_LIBRARY, convolution=choice), context) for choice in ("own", "cudnn")}
    assert len(keys) == 2


@pytest.mark.parametrize(("dtype", "expected"), [("fp16", "own"), ("fp32", "cudnn")])
def test_the_users_choice_reaches_only_the_sessions_with_such_kernels(machine: Machine, dtype: Dtype, expected: str) -> None:
    """ONNX Runtime would refuse an fp32 graph in whose domain there are kernels for other types only."""
    entries = {}

    def open_session(path: Path, settings: SessionSettings) -> Session:
        options = load_onnxruntime().SessionOptions()
        if settings.library is not None:
            configure(options, settings, "graph")
            entries[path.name] = options.get_session_config_entry(CONVOLUTION)
        return machine.open_session(path, replace(settings, library=None))

    settings = replace(WITH_LIBRARY, session_options={CONVOLUTION: "own"})
    open_cuda_engine(CudaContext(0), DIGITS, read_manifest(DIGITS), dtype, settings, open_session=open_session).close()
    assert (entries["noise.onnx"], entries[f"step.{dtype}.onnx"]) == ("cudnn", expected)


def attempts(machine: Machine, refuse: Refuse, placement: Placement = PLACEMENT) -> list[str]:
    """Open the engine of a bundle whose graphs hold the fused operators; return the ways in which the step graph was tried, in order."""
    tried = []

    def open_session(path: Path, settings: SessionSettings) -> Session:
        options = settings.placement.providers[0][1]
        if path.name == "step.fp16.onnx":
            layout = " NHWC" if options.get("prefer_nhwc") == "1" else ""
            tried.append(settings.convolution + layout + ("" if options["enable_cuda_graph"] == "1" else " with copies"))
            if error := refuse(path, settings):
                raise error
        return machine.open_session(path, replace(settings, library=None))

    settings = replace(WITH_LIBRARY, placement=placement)
    open_cuda_engine(CudaContext(0), DIGITS, read_manifest(DIGITS), "fp16", settings, open_session=open_session).close()
    return tried


def test_the_first_way_is_the_fastest(machine: Machine) -> None:
    assert attempts(machine, lambda path, settings: None) == ["own NHWC"]


def test_a_refused_way_is_logged_and_the_next_is_tried(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(path: Path, settings: SessionSettings) -> Exception | None:
        return InferenceError("INVALID_GRAPH: no kernel") if settings.convolution == "own" else None

    with caplog.at_level(logging.DEBUG, "scm_runtime"):
        assert attempts(machine, refuse) == ["own NHWC", "own", "cudnn NHWC"]
    refusals = [record.getMessage() for record in caplog.records if "does not open with" in record.getMessage()]
    assert len(refusals) == 2
    assert all("INVALID_GRAPH: no kernel" in refusal for refusal in refusals)


def test_packed_weights_that_do_not_fit_into_memory_are_done_without(machine: Machine) -> None:
    def refuse(path: Path, settings: SessionSettings) -> Exception | None:
        return OutOfMemoryError("the weights") if settings.convolution == "own" else None

    assert attempts(machine, refuse)[-1] == "cudnn NHWC"


def test_weights_that_do_not_fit_into_memory_are_an_error(machine: Machine) -> None:
    with pytest.raises(OutOfMemoryError, match="the weights"):
        attempts(machine, lambda path, settings: OutOfMemoryError("the weights"))


def test_a_graph_that_cannot_be_captured_runs_with_copies_and_the_log_says_what_helps(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(path: Path, settings: SessionSettings) -> Exception | None:
        return InferenceError("not all nodes") if settings.placement.providers[0][1]["enable_cuda_graph"] == "1" else None

    with caplog.at_level(logging.INFO, "scm_runtime"):
        assert attempts(machine, refuse) == ["own NHWC", "own", "cudnn NHWC", "cudnn", "cudnn with copies"]
    (report,) = [record.getMessage() for record in caplog.records if "without CUDA graphs" in record.getMessage()]
    assert "nodes on the CPU" in report
    assert "native_ops=False" not in report  # with the function bodies, more nodes would be there


def test_the_users_provider_options_win(machine: Machine) -> None:
    (provider, _), *rest = PLACEMENT.providers
    seen = []

    def refuse(path: Path, settings: SessionSettings) -> Exception | None:
        seen.append(settings.placement.providers[0][1])
        return None

    attempts(machine, refuse, replace(PLACEMENT, providers=((provider, {"prefer_nhwc": "0", "use_tf32": "0"}), *rest)))
    assert (seen[0]["prefer_nhwc"], seen[0]["use_tf32"]) == ("0", "0")
