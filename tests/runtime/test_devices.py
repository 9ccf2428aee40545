"""Selection of devices, and the reasons for those that are not available. ``cuda_driver.load_library`` returns a fake driver."""

from __future__ import annotations

import ctypes
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scm_runtime import DeviceError, InferenceError, InvalidArgumentError
from scm_runtime.bundle.location import resolve_bundle
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.common.runs import Run, RunRegistry
from scm_runtime.devices import cuda_driver as driver
from scm_runtime.devices import cuda_libraries as libraries
from scm_runtime.devices import placement as devices
from scm_runtime.devices.placement import CPU, check_cudnn, cuda_unavailable_reason, resolve_device
from scm_runtime.ort.open_session import open_session
from scm_runtime.ort.options import SessionSettings
from scm_runtime.ort.session import run_error
from support import run_python

CUDA, PLUGIN, TENSORRT = "CUDAExecutionProvider", "CudaPluginExecutionProvider", "TensorrtExecutionProvider"
NAMES = ("libcublasLt.so.13", "libcudart.so.13")
ERRORS = {100: "CUDA_ERROR_NO_DEVICE", 803: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", 999: "CUDA_ERROR_UNKNOWN"}


class FakeCuda:
    """Fake libcuda.so.1, with the functions that the package calls."""

    def __init__(self, version: int = 13020, devices: tuple[str, ...] = ("NVIDIA L4",), init: int = 0, capability: tuple[int, int] = (8, 9)) -> None:
        self.version, self.devices, self.init, self.capability = version, devices, init, capability

    def cuInit(self, _flags: int) -> int:
        return self.init

    def cuDriverGetVersion(self, out: Any) -> int:
        return self._give(out, self.version)

    def cuDeviceGetCount(self, out: Any) -> int:
        return self._give(out, len(self.devices))

    def cuDeviceGet(self, out: Any, index: int) -> int:
        return self._give(out, index)

    def cuDeviceGetName(self, name: Any, _size: int, device: Any) -> int:
        name.value = self.devices[device.value].encode()
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, _device: Any) -> int:
        return self._give(out, 24 << 30)

    def cuDeviceGetAttribute(self, out: Any, attribute: int, _device: Any) -> int:
        return self._give(out, self.capability[attribute - 75])

    def cuGetErrorName(self, code: int, out: Any) -> int:
        return self._give(out, ERRORS[code].encode())

    def cuGetErrorString(self, _code: int, out: Any) -> int:
        return self._give(out, b"as the driver says")

    def _give(self, out: Any, value: object) -> int:
        out._obj.value = value
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that fakes the GPU build of ONNX Runtime, a driver, and CUDA libraries, some of which may be missing."""

    def make(cuda: FakeCuda | None, missing: tuple[str, ...] = (), *, core: bool = True) -> None:
        def load_library() -> FakeCuda:
            if cuda is None:
                raise OSError("libcuda.so.1: cannot open shared object file: No such file or directory")
            return cuda

        def dlopen(name: str) -> None:
            if Path(name).name in missing:
                raise OSError(f"{name}: cannot open shared object file")

        monkeypatch.setattr(driver, "load_library", load_library)
        monkeypatch.setattr(load_onnxruntime(), "get_available_providers", lambda: [TENSORRT, CUDA, "CPUExecutionProvider"])
        monkeypatch.setattr(devices, "needed_libraries", lambda _provider: NAMES)
        monkeypatch.setattr(ctypes, "CDLL", dlopen)
        monkeypatch.setattr("importlib.util.find_spec", lambda _: core or None)

    return make


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """The log, as if this process had not logged anything yet."""
    monkeypatch.setattr("scm_runtime.common.log._logged", set())
    caplog.set_level(logging.INFO, "scm_runtime")
    return caplog


def refusal(*arguments: Any, error: type[Exception] = DeviceError) -> str:
    """Message of the error that resolve_device raises."""
    with pytest.raises(error) as caught:
        resolve_device(*arguments)
    return str(caught.value)


# ----------------------------------------------------------------------------
# device=


def test_a_gpu_without_cuda_core(machine: Callable[..., None]) -> None:
    machine(FakeCuda(), core=False)
    assert "cuda-core and cuda-bindings are not installed: pip install 'onnxruntime-gpu[cuda,cudnn]>=" in refusal("cuda")
    assert resolve_device("auto").device == "cpu"
    assert resolve_device("auto", [CUDA]).providers[0][0] == CUDA, "ONNX Runtime alone does without"


def test_the_cpu_needs_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "load_onnxruntime", pytest.fail)
    assert resolve_device("cpu") == resolve_device("cpu", None, {}) == CPU
    assert CPU.index is None


@pytest.mark.parametrize("device", ["gpu", "CUDA", "cuda:", "cuda:-1", "cuda:01", "cuda:x", "cuda:1\n", "", None, 0])
def test_a_device_of_no_known_form(device: Any) -> None:
    said = refusal(device, error=InvalidArgumentError)
    assert repr(device) in said
    assert "'cuda:N'" in said


def test_cuda_is_the_first_gpu(machine: Callable[..., None]) -> None:
    machine(FakeCuda(devices=("NVIDIA L4", "NVIDIA H200")))
    first, second = resolve_device("cuda"), resolve_device("cuda:1", None, {"gpu_mem_limit": 1 << 30, "device_id": 1})
    assert (first.device, first.index, first.hardware) == ("cuda:0", 0, "NVIDIA L4 8.9")
    assert first.providers == ((CUDA, {"device_id": "0"}), ("CPUExecutionProvider", {}))
    assert (second.index, second.hardware) == (1, "NVIDIA H200 8.9")
    assert second.providers[0] == (CUDA, {"device_id": "1", "gpu_mem_limit": str(1 << 30)})


@pytest.mark.parametrize(("index", "named"), [(0, {}), (1, {"device_id": "1"})])
def test_the_first_gpu_is_not_named_to_onnxruntime(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, index: int, named: dict[str, str]) -> None:
    """It looks for a plugin if it is, and prints a line for every session. The first GPU is its default."""
    machine(FakeCuda(devices=("NVIDIA L4", "NVIDIA H200")))
    given: list[Any] = []

    def refuse(*_: Any, providers: list[Any], **__: Any) -> None:
        given.extend(providers)
        raise RuntimeError("no GPU here")

    monkeypatch.setattr(load_onnxruntime(), "InferenceSession", refuse)
    placement = resolve_device(f"cuda:{index}", None, {"use_tf32": 0})
    with pytest.raises(InferenceError, match="no GPU here"):
        open_session(resolve_bundle("digits", None).folder / "noise.onnx", SessionSettings(placement))
    assert given == [(CUDA, {"use_tf32": "0", **named}), ("CPUExecutionProvider", {})]


def test_options_that_fit_no_device(machine: Callable[..., None]) -> None:
    machine(FakeCuda())
    for arguments, expected in (
        (("cpu", None, {"a": 1}), "with device='cpu'"),
        (("auto", None, {"a": 1}), "with device='auto'"),
        (("cuda", None, [{"a": 1}]), "must be one mapping"),
        (("cuda", None, {"device_id": 1}), "are different GPUs"),
        (("cuda", None, {1: 1}), "strings for names"),
    ):
        assert expected in refusal(*arguments, error=InvalidArgumentError)


def test_the_build_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_onnxruntime(), "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(driver, "load_library", pytest.fail)  # a build without CUDA does not need the driver
    assert "has no CUDAExecutionProvider, only CPUExecutionProvider" in refusal("cuda")
    assert "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]>=" in refusal("cuda")


def test_no_driver(machine: Callable[..., None]) -> None:
    machine(None)
    assert "device='cuda' is not available: there is no NVIDIA driver (libcuda.so.1: cannot open" in refusal("cuda")
    assert "--gpus all" in refusal("cuda")


@pytest.mark.parametrize(
    ("code", "remedy"), [(803, "restart the machine"), (999, "nvidia_uvm"), (100, "CUDA_VISIBLE_DEVICES, which is '7'")], ids=["mismatch", "unknown", "none"]
)
def test_a_driver_that_fails(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, code: int, remedy: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    machine(FakeCuda(init=code))
    said = refusal("cuda")
    assert f"cuInit fails with {ERRORS[code]} ({code}): as the driver says" in said
    assert remedy in said


def test_a_driver_that_is_too_old(machine: Callable[..., None]) -> None:
    machine(FakeCuda(version=12080))
    said = refusal("cuda")
    assert "it supports CUDA up to 12.8" in said
    assert "built for CUDA 13" in said
    assert "580 or newer" in said
    machine(FakeCuda(version=13000))
    assert resolve_device("cuda").index == 0


def test_a_gpu_that_is_too_old(machine: Callable[..., None]) -> None:
    machine(FakeCuda(devices=("Tesla V100",), capability=(7, 0)))
    said = refusal("cuda")
    assert "cuda:0 is Tesla V100 7.0" in said
    assert "built for CUDA 13, which supports compute capability 7.5 and newer" in said
    assert "Use device='cpu'" in said
    assert resolve_device("auto").device == "cpu"
    machine(FakeCuda(capability=(12, 0)))
    assert resolve_device("cuda").index == 0


def test_a_gpu_without_code_in_onnxruntime() -> None:
    """It shows in the first run: which GPUs a build of ONNX Runtime has code for is not known before."""
    failed = RuntimeError("CUDA error cudaErrorNoKernelImageForDevice: no kernel image is available for execution on the device")
    error = run_error(Path("step.fp16.onnx"), failed, Run(RunRegistry(), None), "a batch of 1 on cuda:0")
    assert isinstance(error, DeviceError)
    assert "has no code for the GPU: a batch of 1 on cuda:0 in 'step.fp16.onnx' failed" in str(error)
    assert "Use device='cpu'" in str(error)


def test_no_such_gpu(machine: Callable[..., None]) -> None:
    machine(FakeCuda(devices=("NVIDIA L4", "NVIDIA L4")))
    assert "there is no device cuda:2: the driver has 2, numbered from 0; cuda:0 is NVIDIA L4; cuda:1 is NVIDIA L4" in refusal("cuda:2")


def test_a_missing_library_is_named_with_its_package(machine: Callable[..., None]) -> None:
    machine(FakeCuda(), missing=("libcublasLt.so.13",))
    said = refusal("cuda")
    assert "needs libcublasLt.so.13, which cannot be loaded" in said
    assert said.endswith("pip install 'nvidia-cublas~=13.0'")
    assert said == f"device='cuda' is not available: {cuda_unavailable_reason()}"
    machine(FakeCuda(), missing=NAMES)
    assert refusal("cuda").endswith("pip install 'nvidia-cublas~=13.0' 'nvidia-cuda-runtime~=13.0'")


def test_auto_takes_the_gpu_and_says_so_once(machine: Callable[..., None], log: pytest.LogCaptureFixture) -> None:
    machine(FakeCuda())
    assert resolve_device().device == resolve_device("auto").device == "cuda:0"
    assert log.messages == ["device 'auto' is cuda:0, NVIDIA L4 8.9"]


def test_auto_without_a_gpu_is_the_cpu_and_says_why_once(
    machine: Callable[..., None], log: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    machine(None)
    assert resolve_device().device == resolve_device().device == "cpu"
    assert len(log.messages) == 1
    assert "there is no NVIDIA driver" in log.messages[0]
    assert resolve_device().reason in log.messages[0]
    assert capfd.readouterr() == ("", "")


# ----------------------------------------------------------------------------
# providers=


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_onnxruntime(), "get_available_providers", lambda: ["OpenVINOExecutionProvider", "CPUExecutionProvider"])


@pytest.mark.usefixtures("known")
def test_providers_pass_as_they_are() -> None:
    openvino = ("OpenVINOExecutionProvider", {"device_type": "CPU", "num_streams": "2"})
    for arguments in (
        ([("OpenVINOExecutionProvider", {"device_type": "CPU", "num_streams": 2})],),
        ([["OpenVINOExecutionProvider", {"device_type": "CPU", "num_streams": 2}], "CPUExecutionProvider"],),
        (["OpenVINOExecutionProvider"], [{"device_type": "CPU", "num_streams": 2}]),
    ):
        placement = resolve_device("auto", *arguments)
        assert placement.providers == (openvino, ("CPUExecutionProvider", {}))
        assert (placement.device, placement.index, placement.hardware) == ("openvino", None, "")
    assert resolve_device(providers=["CPUExecutionProvider"]).device == "cpu"


@pytest.mark.usefixtures("known")
def test_invalid_providers() -> None:
    name = "OpenVINOExecutionProvider"
    for arguments, expected in (
        (("auto", ["OpenVINO"]), "no provider 'OpenVINO'; it has OpenVINOExecutionProvider, CPUExecutionProvider"),
        (("cuda", [name]), "device='cuda' and providers="),
        (("auto", name), "must be a list"),
        (("auto", []), "must be a list"),
        (("auto", [3]), "a provider must be a name"),
        (("auto", [(name,)]), "a provider must be a name"),
        (("auto", [(name, None)]), "a provider must be a name"),
        (("auto", [name], [{}, {}]), "a list of 1 mappings"),
        (("auto", [name], {"a": 1}), "a list of 1 mappings"),
        (("auto", [(name, {})], [{}]), "names only"),
        (("auto", [name], ["a"]), "the options a mapping"),
    ):
        assert expected in refusal(*arguments, error=InvalidArgumentError)


def test_providers_on_a_gpu_need_what_it_needs(machine: Callable[..., None]) -> None:
    machine(FakeCuda(devices=("NVIDIA L4", "NVIDIA H200")))
    placement = resolve_device(providers=[(TENSORRT, {"device_id": 1}), CUDA])
    assert (placement.device, placement.index, placement.hardware) == ("tensorrt", None, "NVIDIA H200 8.9")
    assert [name for name, _ in placement.providers] == [TENSORRT, CUDA, "CPUExecutionProvider"]
    machine(None)
    assert "there is no NVIDIA driver" in refusal("auto", [CUDA])


# ----------------------------------------------------------------------------
# The CUDA provider as a plugin, and cuDNN


@pytest.fixture
def plugin(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
    """Fake an ONNX Runtime without CUDA and the package of the plugin. Returns the registrations that follow, with name and path."""
    registered: list[tuple[str, str]] = []
    library = tmp_path / "libonnxruntime_providers_cuda.so"
    library.write_bytes(b"")
    machine(FakeCuda())
    ort = load_onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(ort, "get_ep_devices", lambda: [SimpleNamespace(ep_name=name) for name, _ in registered])
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda name, path: registered.append((name, path)))
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_cuda", SimpleNamespace(get_library_path=lambda: str(library)))
    return registered


def test_the_plugin_is_the_cuda_device_of_an_onnxruntime_without_cuda(plugin: list[tuple[str, str]]) -> None:
    for device in ("cuda", "auto", "cuda:0"):
        placement = resolve_device(device)
        assert (placement.device, placement.index) == ("cuda:0", 0)
        assert placement.providers == ((PLUGIN, {"device_id": "0"}), ("CPUExecutionProvider", {}))
    assert [name for name, _ in plugin] == [PLUGIN], "it is registered once"
    assert resolve_device(providers=[PLUGIN]).hardware == "NVIDIA L4 8.9"


def test_the_built_in_cuda_provider_comes_before_the_plugin(plugin: list[tuple[str, str]], machine: Callable[..., None]) -> None:
    machine(FakeCuda())
    assert resolve_device("cuda").providers[0][0] == CUDA
    assert plugin == []


def test_a_plugin_that_cannot_be_registered(plugin: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    def refuse(_name: str, _path: str) -> None:
        raise RuntimeError("it needs a newer ONNX Runtime")

    monkeypatch.setattr(load_onnxruntime(), "register_execution_provider_library", refuse)
    assert "has no CUDAExecutionProvider" in refusal("cuda")
    assert ["it needs a newer ONNX Runtime" in message for message in log.messages] == [True]


def test_cudnn_is_demanded_only_by_graphs_that_need_it(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(FakeCuda(), missing=("libcudnn.so.9",))
    monkeypatch.setattr(devices, "needed_libraries", lambda _provider: (*NAMES, "libcudnn.so.9"))
    assert resolve_device("cuda").device == "cuda:0"
    assert resolve_device(providers=[CUDA]).providers[0][0] == CUDA
    assert resolve_device("auto").device == "cpu", "which graphs will be opened is not known"
    check_cudnn("step.onnx", {CUDA: {"MatMul": 3}, "CPUExecutionProvider": {"Conv": 1}})
    for provider in (CUDA, PLUGIN):
        with pytest.raises(DeviceError, match=r"the operator Conv of 'step.onnx' needs libcudnn.so.9, .* pip install nvidia-cudnn-cu13"):
            check_cudnn("step.onnx", {provider: {"MatMul": 3, "Conv": 2}})
    machine(FakeCuda())
    check_cudnn("step.onnx", {CUDA: {"Conv": 2}})
    machine(FakeCuda(), missing=("libcublasLt.so.13", "libcudnn.so.9"))
    monkeypatch.setattr(devices, "needed_libraries", lambda _provider: (*NAMES, "libcudnn.so.9"))
    assert refusal("cuda").endswith("pip install 'nvidia-cublas~=13.0' nvidia-cudnn-cu13"), "one command for all"


# ----------------------------------------------------------------------------
# libraries


def test_what_a_library_is_linked_with() -> None:
    capi = Path(load_onnxruntime().__file__).parent / "capi"
    with next(capi.glob("onnxruntime_pybind11_state*.so")).open("rb") as file:
        assert "libc.so.6" in libraries.needed_names(file)


def test_files_that_are_not_libraries(tmp_path: Path) -> None:
    for content in (b"", b"\x7fELF", b"\x7fELF\x02\x01" + bytes(58), b"\x7fELF\x02\x01" + b"\xff" * 90):
        path = tmp_path / "no.so"
        path.write_bytes(content)
        assert libraries.vendor_libraries(path) == ()


@pytest.mark.skipif(sys.platform != "linux", reason="the loader of Linux")
def test_libraries_in_python_packages_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "nvidia" / "cu99" / "lib"
    folder.mkdir(parents=True)
    shutil.copy(next((Path(load_onnxruntime().__file__).parent / "capi").glob("libonnxruntime_providers_shared.so")), folder / "libcublas.so.99")
    program = """
import sys
from scm_runtime.devices.cuda_libraries import install_command, load
sys.path.append(sys.argv[1])
found, missing = load(["libcublas.so.99", "libcudart.so.99"])
assert found.path == sys.argv[1] + "/nvidia/cu99/lib/libcublas.so.99" and found.error is None, found
assert missing.path is None and "libcudart.so.99: cannot open" in missing.error, missing
assert install_command([missing]) == "pip install 'nvidia-cuda-runtime~=99.0'"
"""
    done = run_python(program, tmp_path)
    assert done.stdout == done.stderr == ""


def test_packages_by_the_version_of_cuda() -> None:
    names = ["libcudart.so.{}", "libcublasLt.so.{}", "libcublas.so.{}", "libcurand.so.10", "libcudnn.so.9", "libnvinfer.so.10", "libnvunknown.so.1"]
    for major, expected in (
        (12, "pip install 'nvidia-cuda-runtime-cu12~=12.0' 'nvidia-cublas-cu12~=12.0' nvidia-curand-cu12 nvidia-cudnn-cu12 'tensorrt-cu12~=10.0'"),
        (13, "pip install 'nvidia-cuda-runtime~=13.0' 'nvidia-cublas~=13.0' nvidia-curand nvidia-cudnn-cu13 'tensorrt-cu13~=10.0'"),
    ):
        wanted = [name.format(major) for name in names]
        assert libraries.cuda_major(wanted) == major
        missing = [libraries.Library(name, None, "missing", libraries._package(name, major)) for name in wanted]
        assert libraries.install_command(missing) == expected
    assert libraries.cuda_major(["libcurand.so.10"]) is None
