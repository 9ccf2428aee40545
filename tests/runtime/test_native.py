"""Whether sessions use the kernels of the native library or the function bodies. Stub libraries, compiled here, replace the real one.

tests/ops and, for whole bundles, tests/end_to_end check that kernels and function bodies compute the same.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

import scm_runtime
from scm_runtime import Generator, InferenceError, InvalidArgumentError, NativeOpsError
from scm_runtime.bundle.manifest import OPS_DOMAIN, OPS_VERSION, Manifest, read_manifest
from scm_runtime.cli import main
from scm_runtime.common import log as log_module
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.devices.cuda_driver import Device, Driver
from scm_runtime.devices.placement import Placement
from scm_runtime.ort import native_ops as native
from scm_runtime.ort.options import RECORD_PLACEMENT, SessionSettings
from scm_runtime.ort.session import Session

onnxruntime = load_onnxruntime()

BUILD_INFO = {"version": "9.8.7", "ops": {OPS_DOMAIN: OPS_VERSION}, "ort_api": 18, "ort_headers": "1.21", "cuda": None, "compiler": "cc"}

# Declares only the first members of ONNX Runtime's C API, whose positions never change. They suffice to create a status.
STUBS = {
    "accepts": "void *RegisterCustomOps(void *options, const void *base) { return 0; }",
    "refuses": """
        typedef struct { const void *(*GetApi)(unsigned); const char *(*GetVersionString)(void); } Base;
        typedef void *(*CreateStatus)(int, const char *);
        void *RegisterCustomOps(void *options, const Base *base) {
            return (*(const CreateStatus *)base->GetApi(1))(1, "scm_ops needs ONNX Runtime 1.99 or newer");
        }""",
    "exports_nothing": "int unused;",
}

InstallStub = Callable[..., Path]
Log = list[tuple[str, str]]


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Compiled stub libraries by name."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder, libraries = tmp_path_factory.mktemp("stubs"), {}
    for name, source in STUBS.items():
        (folder / f"{name}.c").write_text(source)
        libraries[name] = folder / f"{name}.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", libraries[name], folder / f"{name}.c"], check=True)
    return libraries


@pytest.fixture
def install(stubs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InstallStub:
    """A function: ``install("accepts", version="…")`` installs a stub library with this build info and returns its path."""

    def install(stub: str, **build_info: Any) -> Path:
        folder = tmp_path / "site" / native.FOLDER
        folder.mkdir(parents=True)
        library = folder / native.LIBRARY
        shutil.copy(stubs[stub], library)
        (folder / native.BUILD_INFO).write_bytes(msgspec.json.encode(BUILD_INFO | build_info))
        monkeypatch.setattr(scm_runtime, "__path__", [str(folder.parent), *scm_runtime.__path__])
        return library

    return install


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LIBRARY", "libabsent.so")


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle, whose manifest declares operators of the current version. The stubs have no kernels for them."""
    return with_ops(tiny_bundle, tmp_path / "tiny.scm", {OPS_DOMAIN: OPS_VERSION})


def with_ops(bundle: Path, copy: Path, ops: dict[str, int]) -> Path:
    """Copy a bundle and set the operator versions in its manifest."""
    shutil.copytree(bundle, copy, copy_function=lambda source, target: Path(target).hardlink_to(source))
    manifest = msgspec.json.decode((copy / "scm.json").read_bytes(), type=Manifest)
    manifest.ops = ops
    (copy / "scm.json").unlink()
    (copy / "scm.json").write_bytes(manifest.to_json())
    return copy


@pytest.fixture
def log() -> Iterator[Log]:
    """Log records of scm_runtime as (level, message)."""

    class ListHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not record.getMessage().startswith("device 'auto'"):  # logged once per process, in the first test that needs it
                lines.append((record.levelname, record.getMessage()))

    lines: Log = []
    logger, handler = logging.getLogger("scm_runtime"), ListHandler()
    log_module._logged.clear()
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_native_kernels_are_used_if_possible(bundle: Path, install: InstallStub, log: Log) -> None:
    install("accepts")
    for native_ops in ("auto", True):
        with Generator(bundle, native_ops=native_ops) as generate:
            assert generate.info.native_ops is True
            assert (generate.info.native_ops_version, generate.info.native_ops_reason) == ("9.8.7", None)
            assert len(generate(seed=1, output_type="np")) == 1
    assert log == []


def test_info(bundle: Path, install: InstallStub) -> None:
    install("refuses")
    info = Generator(bundle, native_ops=False).info
    assert (info.bundle, info.dtype, info.device, info.provider) == ("tiny", "fp32", "cpu", "CPUExecutionProvider")
    assert info.onnxruntime == onnxruntime.__version__
    assert set(info.nodes) == {"CPUExecutionProvider"}
    assert info.nodes["CPUExecutionProvider"] > 20
    assert Generator(bundle, native_ops=False, session_options={RECORD_PLACEMENT: "0"}).info.nodes == {}
    assert (info.native_ops, info.native_ops_version, info.native_ops_reason) == (False, None, "native_ops=False")


def test_native_ops_false_does_not_register_the_library(bundle: Path, install: InstallStub, log: Log) -> None:
    install("refuses")
    with Generator(bundle, native_ops=False) as generate:
        generate(seed=1, output_type="np")
    assert log == []


def test_without_the_library(bundle: Path, no_library: None, log: Log, tiny: Generator) -> None:
    for _ in range(2):
        with Generator(bundle) as generate:
            assert generate.info.native_ops is False
            np.testing.assert_array_equal(generate(seed=1, output_type="np").array, tiny(seed=1, output_type="np").array)
    assert "this installation has no _native/libabsent.so" in str(generate.info.native_ops_reason)
    ((level, message),) = log  # logged once for both Generators
    assert (level, message) == ("DEBUG", f"the function bodies run instead of the native kernels: {generate.info.native_ops_reason}")
    with pytest.raises(NativeOpsError, match=r"native_ops=True, but this installation has no _native/libabsent\.so.*make ops") as caught:
        Generator(bundle, native_ops=True)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ({}, r"the bundle 'tiny' contains no scm:: operators\. .*without --no-custom-ops"),
        ({OPS_DOMAIN: 2}, r"the bundle 'tiny' needs operators of scm:: version 2, but '.*' has kernels for scm:: version 1\. Upgrade scm-runtime\."),
        ({"other": 1}, r"the bundle 'tiny' needs operators of other:: version 1, but '.*' has kernels for scm:: version 1\. Upgrade scm-runtime\."),
    ],
    ids=["none", "newer", "another-domain"],
)
def test_a_bundle_whose_operators_the_library_does_not_support(
    tiny_bundle: Path, tmp_path: Path, install: InstallStub, log: Log, ops: dict[str, int], message: str
) -> None:
    install("accepts")
    bundle = with_ops(tiny_bundle, tmp_path / "tiny.scm", ops)
    with Generator(bundle) as generate:
        assert len(generate(seed=1, output_type="np")) == 1
        assert not generate.info.native_ops
    assert [level for level, _ in log] == ["DEBUG"]
    with pytest.raises(NativeOpsError, match="native_ops=True, but " + message):
        Generator(bundle, native_ops=True)


def test_a_library_with_a_newer_operator_version(bundle: Path, install: InstallStub) -> None:
    install("accepts", ops={OPS_DOMAIN: 2})
    with pytest.raises(NativeOpsError, match=r"needs operators of scm:: version 1, but '.*' has kernels for scm:: version 2\. Export its checkpoint again"):
        Generator(bundle, native_ops=True)
    assert Generator(bundle).info.native_ops is False


def test_a_library_with_additional_domains(bundle: Path, install: InstallStub) -> None:
    install("accepts", ops={OPS_DOMAIN: OPS_VERSION, "other": 3})
    assert Generator(bundle, native_ops=True).info.native_ops is True


@pytest.mark.parametrize(
    ("stub", "message"),
    [
        ("refuses", "scm_ops needs ONNX Runtime 1.99 or newer"),  # built for a newer ONNX Runtime
        ("exports_nothing", "RegisterCustomOps"),
    ],
)
def test_a_library_that_cannot_be_registered(bundle: Path, install: InstallStub, log: Log, stub: str, message: str) -> None:
    library = install(stub)
    with pytest.raises(NativeOpsError, match="native_ops=False") as caught:
        Generator(bundle, native_ops=True)
    for part in (f"ONNX Runtime {onnxruntime.__version__} ", str(library), message):
        assert part in str(caught.value)
    with Generator(bundle) as generate:
        assert generate.info.native_ops is False
        assert generate.info.native_ops_reason == str(caught.value)
        assert len(generate(seed=1, output_type="np")) == 1
    ((level, logged),) = log
    assert level == "WARNING"
    assert message in logged


@pytest.mark.parametrize("damage", ["missing", "no JSON", "incomplete"])
def test_a_damaged_installation(bundle: Path, install: InstallStub, log: Log, damage: str) -> None:
    build_info = install("accepts").with_name(native.BUILD_INFO)
    build_info.unlink()
    if damage != "missing":
        build_info.write_text("{" if damage == "no JSON" else '{"version": "1"}')
    with pytest.raises(NativeOpsError, match=r"scm_ops\.json', which describes the library of native kernels, cannot be read: .*Install scm-runtime again"):
        Generator(bundle, native_ops=True)
    assert Generator(bundle).info.native_ops is False
    assert [level for level, _ in log] == ["WARNING"]


def test_a_graph_that_opens_only_without_the_library(bundle: Path, install: InstallStub, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, a kernel is missing for a type: within a session ONNX Runtime does not fall back to the function body."""
    original = Session.__init__

    def init(self: Session, path: Path, session: Any, settings: SessionSettings) -> None:
        if settings.library is not None and path.name.startswith("decode"):
            raise InferenceError("no kernel")
        original(self, path, session, settings)

    monkeypatch.setattr(Session, "__init__", init)
    install("accepts")
    with pytest.raises(InferenceError, match="no kernel"):
        Generator(bundle, native_ops=True)
    with Generator(bundle) as generate:
        assert generate.info.native_ops is False
        assert len(generate(seed=1, output_type="np")) == 1
    assert log == [("WARNING", "the function bodies run instead of the native kernels: no kernel")]


def test_a_graph_that_opens_neither_with_nor_without_the_library(bundle: Path, install: InstallStub, log: Log) -> None:
    install("accepts")
    step = bundle / "step.fp32.onnx"
    size = step.stat().st_size
    step.unlink()
    step.write_bytes(b"x" * size)
    with pytest.raises(InferenceError, match=r"cannot open '.*step\.fp32\.onnx'.*native_ops=False"):
        Generator(bundle, native_ops=True, verify_integrity=False)
    with pytest.raises(InferenceError, match=r"cannot open '.*step\.fp32\.onnx'.*export the checkpoint again\.$"):
        Generator(bundle, verify_integrity=False)
    assert log == []


@pytest.mark.parametrize("value", ["yes", None, 1, "on"], ids=repr)
def test_invalid_values_of_native_ops(tiny_bundle: Path, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"native_ops must be True, False or 'auto', got "):
        Generator(tiny_bundle, native_ops=value)


def test_native_ops_options_of_the_command_line(bundle: Path, install: InstallStub, tmp_path: Path) -> None:
    def call(*arguments: str | Path) -> Any:
        return CliRunner(catch_exceptions=False).invoke(main, [str(argument) for argument in arguments])

    library = install("accepts")
    assert "native kernels 9.8.7\n" in call("smoke", bundle, "--threads", "1").stdout
    assert "function bodies, no native kernels: native_ops=False\n" in call("smoke", bundle, "--no-native-ops", "--threads", "1").stdout
    assert "scm 1" in call("inspect", bundle).stdout
    generate: list[str | Path] = ["generate", bundle, "-o", tmp_path / "x.png", "--seed", "1"]
    smoke: list[str | Path] = ["smoke", bundle]
    for options in ([], ["--native-ops"], ["--no-native-ops"]):
        assert call(*generate, *options).exit_code == 0
    library.with_name(native.BUILD_INFO).write_bytes(msgspec.json.encode(BUILD_INFO | {"ops": {OPS_DOMAIN: 2}}))
    assert call(*generate).exit_code == 0
    for command in (generate, smoke):
        result = call(*command, "--native-ops")
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: --native-ops, but the bundle 'tiny' needs operators of scm:: version 1")


def test_the_library_of_this_checkout() -> None:
    """The library built from cpp_ops/ has kernels for the operator version that scm-export writes."""
    library = native.find_library()
    if library is None:
        pytest.skip("the native library is missing: run make ops")
    assert library.info.ops == {OPS_DOMAIN: OPS_VERSION}
    assert library.info.ort_api <= int(onnxruntime.__version__.split(".")[1])


# ----------------------------------------------------------------------------
# Devices other than the CPU.

H200 = Placement("cuda:0", (("CUDAExecutionProvider", {}), ("CPUExecutionProvider", {})), "requested")
OPENVINO = Placement("openvino", (("OpenVINOExecutionProvider", {}), ("CPUExecutionProvider", {})), "requested")
CUDA_KERNELS = {"version": "13.0", "architectures": ["80", "86", "89", "90"], "ptx": ["90"]}
WITHOUT_PTX = {"version": "13.0", "architectures": ["80", "90a"], "ptx": []}
ONE_GPU_ONLY = {"version": "13.0", "architectures": ["100a"], "ptx": ["100a"]}
OLDER_BUILD = {"version": "13.0", "architectures": ["80", "86", "89", "90"]}  # says nothing about PTX


@pytest.mark.parametrize(
    ("placement", "cuda", "driver", "capability", "reason"),
    [
        (H200, CUDA_KERNELS, 13000, "9.0", None),
        (H200, CUDA_KERNELS, 13010, "12.0", None),  # newer GPUs compile the PTX
        (H200, None, 13000, "9.0", r"built without CUDA kernels\. .*make ops SCM_OPS_CUDA=ON"),
        (H200, CUDA_KERNELS, 12040, "9.0", r"built with CUDA 13\.0, and the NVIDIA driver supports CUDA up to 12\.4\. Update it"),
        (H200, OLDER_BUILD, 13010, "12.0", None),
        (
            H200,
            CUDA_KERNELS,
            13000,
            "7.5",
            r"kernels for compute capability 8\.0, 8\.6, 8\.9, 9\.0 and newer, and Some GPU has 7\.5\. Build it there: .*make ops",
        ),
        (H200, WITHOUT_PTX, 13000, "8.9", None),  # machine code for 8.0
        (H200, WITHOUT_PTX, 13000, "10.0", r"kernels for compute capability 8\.0, 9\.0, and Some GPU has 10\.0"),
        (H200, ONE_GPU_ONLY, 13000, "10.0", None),
        (H200, ONE_GPU_ONLY, 13000, "10.3", r"kernels for compute capability 10\.0, and Some GPU has 10\.3"),
        (H200, {**CUDA_KERNELS, "version": "13.2"}, 13000, "12.0", "Some GPU has 12"),  # the driver cannot compile this PTX
        (OPENVINO, CUDA_KERNELS, 13000, "9.0", "none for OpenVINOExecutionProvider"),
    ],
    ids=[
        *("supported", "newer GPU", "no CUDA kernels", "old driver", "newer GPU, older build", "old GPU", "later minor version", "no PTX"),
        *("code for one GPU", "code for another GPU", "PTX too new", "other provider"),
    ],
)
def test_kernels_on_other_devices(
    placement: Placement,
    cuda: dict[str, Any] | None,
    driver: int,
    capability: str,
    reason: str | None,
    bundle: Path,
    install: InstallStub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install("accepts", cuda=cuda)
    monkeypatch.setattr("scm_runtime.devices.cuda_driver.read_driver", lambda: Driver(driver, (Device(0, "Some GPU", capability, 1 << 30),)))
    manifest = read_manifest(bundle)
    opened, kernels = native.open_with_native_ops(manifest, "auto", placement, lambda library: library)
    if reason is None:
        assert opened is not None
        assert kernels.reason is None
        return
    assert opened is None
    assert kernels.reason is not None
    assert re.search(reason, kernels.reason), kernels.reason
    with pytest.raises(NativeOpsError, match=reason):
        native.open_with_native_ops(manifest, True, placement, lambda library: library)
