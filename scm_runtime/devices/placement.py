"""Resolve a device to ONNX Runtime's providers, or explain why it is not available.

This queries the driver and loads libraries, but allocates nothing on the device. Sessions are opened elsewhere.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scm_runtime.common.installed import install_extras
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.common.log import log_once
from scm_runtime.devices.cuda_libraries import Library, cuda_major, install_command, is_cudnn, load, provider_library, vendor_libraries
from scm_runtime.devices.cuda_plugin import CUDA_PLUGIN, plugin_library, register_cuda_plugin
from scm_runtime.errors import DeviceError, InvalidArgumentError

CPU_PROVIDER, CUDA_PROVIDER, TENSORRT_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
CUDA_PROVIDERS = (CUDA_PROVIDER, CUDA_PLUGIN, TENSORRT_PROVIDER)
# Operators whose CUDA kernels call cuDNN.
CUDNN_OPS = frozenset(
    (
        *("Conv", "FusedConv", "NhwcConv", "NhwcFusedConv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"),
        *("BatchNormalization", "InstanceNormalization", "LRN", "RNN", "GRU", "LSTM"),
    )
)
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # on Linux, by CUDA's major version. Source: CUDA's release notes, "minor version compatibility"
OLDEST_CAPABILITY = {11: (3, 5), 12: (5, 0), 13: (7, 5)}  # of GPUs that CUDA compiles for, by its major version. Source: CUDA's release notes


@dataclass(frozen=True)
class Placement:
    """A device, and the providers that run graphs on it."""

    device: str
    """"cpu" or "cuda:0"; with ``providers=``, the first provider's short name: "tensorrt", "openvino"."""
    providers: tuple[tuple[str, dict[str, str]], ...]
    """Providers and their options, in InferenceSession's order. Includes CPUExecutionProvider."""
    reason: str
    """Why this device was selected."""
    hardware: str = ""
    """Name and compute capability of the GPU: "NVIDIA L4 8.9". Empty for the CPU, or if it is not known."""

    @property
    def index(self) -> int | None:
        """Index of the CUDA device; None for other devices, and for CUDA's provider if it was selected with ``providers=``."""
        return int(self.device[5:]) if self.device.startswith("cuda:") else None


CPU = Placement("cpu", ((CPU_PROVIDER, {}),), "device='cpu'")


def resolve_device(
    device: str = "auto",
    providers: Sequence[str | tuple[str, Mapping[str, object]]] | None = None,
    provider_options: Mapping[str, object] | Sequence[Mapping[str, object]] | None = None,
) -> Placement:
    """Return the placement for a device or for providers.

    Args:
        device: "cpu"; "cuda" (the first GPU) or "cuda:N"; or "auto": the first GPU if one is available, else the CPU, with the reason logged once per
            process.
        providers: for experts, instead of a device: ONNX Runtime's providers by name or as (name, options), in InferenceSession's order.
            CPUExecutionProvider is appended if it is not among them: it runs the nodes that the others do not support.
        provider_options: with ``providers`` given by name, one mapping of options per provider. With device "cuda", one mapping of options for
            CUDAExecutionProvider. Values are converted to strings, as ONNX Runtime requires.

    Raises:
        InvalidArgumentError: there is no such device or provider, or the arguments contradict each other.
        DeviceError: the device is not available. The message names what is missing and how to install it.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    if providers is not None:
        if device != "auto":
            raise InvalidArgumentError(f"device and providers exclude each other, got device={device!r} and providers={providers!r}. Leave one out.")
        return _place_providers(_pairs(providers, provider_options))
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,5}))?", device, re.ASCII):
        raise InvalidArgumentError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}. In Python, providers=[…] selects others.")
    if provider_options and not device.startswith("cuda"):
        raise InvalidArgumentError(f"provider_options are for device='cuda' or for providers=[…], got {provider_options!r} with device={device!r}")
    if device == "cpu":
        return CPU
    if device == "auto":
        if reason := cuda_unavailable_reason(0):
            log_once(logging.INFO, f"device 'auto' is the CPU: {reason}")
            return Placement("cpu", CPU.providers, reason)
        placement = _cuda(0, {}, "device='auto' found it")
        log_once(logging.INFO, f"device 'auto' is {placement.device}, {placement.hardware}")
        return placement
    index = int(device.partition(":")[2] or 0)
    if provider_options is not None and not isinstance(provider_options, Mapping):
        raise InvalidArgumentError(f"provider_options must be one mapping with device={device!r}, got {provider_options!r}")
    options = _strings(CUDA_PROVIDER, provider_options or {})
    if options.get("device_id", str(index)) != str(index):
        raise InvalidArgumentError(f"device={device!r} and provider_options' device_id={options['device_id']!r} are different GPUs. Leave device_id out.")
    if reason := cuda_unavailable_reason(index, with_cudnn=False):  # opening a graph that needs it checks this
        raise DeviceError(f"device={device!r} is not available: {reason}")
    return _cuda(index, options, f"device={device!r}")


def all_devices() -> tuple[str, ...]:
    """Return all GPUs, "cuda:0" and so on; or the CPU if CUDA is not available, and log why."""
    if reason := cuda_unavailable_reason():
        log_once(logging.INFO, f"no GPU is used: {reason}")
        return ("cpu",)
    from scm_runtime.devices.cuda_driver import read_driver

    return tuple(f"cuda:{device.index}" for device in read_driver().devices)


def cuda_provider(known: Sequence[str]) -> str:
    """Name of the CUDA provider among the known ones: the one that ONNX Runtime was built with, or else its plugin."""
    return next((name for name in (CUDA_PROVIDER, CUDA_PLUGIN) if name in known), CUDA_PROVIDER)


def known_providers() -> list[str]:
    """Names of the providers that ONNX Runtime was built with, and of plugins registered in this process. Registers the CUDA plugin if it is needed."""
    ort = load_onnxruntime()
    built_in = ort.get_available_providers()
    if CUDA_PROVIDER not in built_in:
        register_cuda_plugin(ort)
    plugins = [device.ep_name for device in getattr(ort, "get_ep_devices", list)()]
    return list(dict.fromkeys([*built_in, *plugins]))


def cuda_unavailable_reason(index: int = 0, *, with_cudnn: bool = True) -> str | None:
    """Explain why a CUDA device is not available, and how to fix it; None if it is available. Graphs without the operators ``CUDNN_OPS`` need no cuDNN.

    This also loads the CUDA libraries that ONNX Runtime needs, which it would not find in NVIDIA's Python packages.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
    """
    return provider_unavailable_reason(cuda_provider(known_providers()), index, with_cudnn=with_cudnn) or _cuda_core_unavailable_reason()


def needed_libraries(provider: str = CUDA_PROVIDER) -> tuple[str, ...]:
    """Names of NVIDIA's libraries that a provider of this ONNX Runtime needs; empty if there is no such provider, or if they are not known."""
    path = plugin_library() if provider == CUDA_PLUGIN else provider_library(Path(load_onnxruntime().__file__).parent, provider)
    return () if path is None else vendor_libraries(path)


def check_cudnn(graph: str, nodes: Mapping[str, Mapping[str, int]]) -> None:
    """Raise DeviceError if cuDNN is missing and a graph has nodes that need it on a CUDA provider.

    Args:
        graph: the graph's path.
        nodes: number of nodes by provider and operator.
    """
    for provider in (CUDA_PROVIDER, CUDA_PLUGIN):
        op = next((op for op in nodes.get(provider, ()) if op in CUDNN_OPS), None)
        if op and (reason := missing_cudnn(provider)):
            raise DeviceError(f"the operator {op} of '{graph}' needs {reason}")


def missing_cudnn(provider: str) -> str | None:
    """Return why cuDNN cannot be loaded for a CUDA provider, and the remedy; None if it is loaded, or not known to be needed."""
    names = needed_libraries(provider)
    missing = [library for library in load(filter(is_cudnn, names), cuda_major(names)) if library.error is not None]
    return _missing_text(missing) if missing else None


def provider_unavailable_reason(provider: str, index: int, *, with_cudnn: bool = True) -> str | None:
    """Explain why one of CUDA's providers is not available on a GPU, and how to fix it; None if it is available."""
    ort = load_onnxruntime()
    available = known_providers()
    if provider not in available:
        return (
            f"ONNX Runtime {ort.__version__} has no {provider}, only {', '.join(available)}: it is not the build for CUDA. Install that one: "
            f"pip uninstall -y onnxruntime && {install_extras('gpu')}"
        )
    from scm_runtime.devices.cuda_driver import read_driver  # imports ctypes, which only a build for CUDA needs

    driver, names = read_driver(), needed_libraries(provider)
    if driver.error is not None:
        return driver.error
    major = cuda_major(names)
    if major is not None and driver.cuda_major is not None and driver.cuda_major < major:
        oldest = f"version {OLDEST_DRIVER[major]} or newer" if major in OLDEST_DRIVER else f"a version for CUDA {major}"
        return (
            f"the NVIDIA driver is too old: it supports CUDA up to {driver.cuda_version}, and ONNX Runtime "
            f"{ort.__version__} is built for CUDA {major}. Install the driver in {oldest}, or an onnxruntime-gpu for CUDA {driver.cuda_major}."
        )
    if index >= len(driver.devices):
        listed = "".join(f"; cuda:{device.index} is {device.name}" for device in driver.devices)
        return f"there is no device cuda:{index}: the driver has {len(driver.devices)}, numbered from 0{listed}. CUDA_VISIBLE_DEVICES may hide others."
    device = driver.devices[index]
    if major in OLDEST_CAPABILITY and tuple(map(int, device.compute_capability.split("."))) < OLDEST_CAPABILITY[major]:
        oldest = ".".join(map(str, OLDEST_CAPABILITY[major]))
        return (
            f"cuda:{index} is {device.name} {device.compute_capability}, and ONNX Runtime {ort.__version__} is built for CUDA {major}, which supports "
            f"compute capability {oldest} and newer. Use device='cpu', or install an onnxruntime-gpu for an older CUDA."
        )
    missing = [library for library in load(names) if library.error is not None]
    demanded = missing if with_cudnn else [library for library in missing if not is_cudnn(library.name)]
    return f"{provider} needs {_missing_text(missing)}" if demanded else None


def _missing_text(missing: Sequence[Library]) -> str:
    """Names of missing libraries, why they cannot be loaded, and the remedy."""
    listed, command = ", ".join(library.name for library in missing), install_command(missing)
    remedy = f"Install them: {command}" if command else "Install CUDA, or add its library folder to LD_LIBRARY_PATH."
    return f"{listed}, which cannot be loaded ({missing[0].error}). {remedy}"


def _cuda_core_unavailable_reason() -> str | None:
    from importlib.util import find_spec  # needed only with a GPU

    try:
        found = find_spec("cuda.core") and find_spec("cuda.bindings")
    except ModuleNotFoundError:  # the package cuda is missing
        found = None
    return None if found else f"cuda-core and cuda-bindings are not installed: {install_extras('gpu')}"


def _cuda(index: int, options: dict[str, str], reason: str) -> Placement:
    return Placement(f"cuda:{index}", ((cuda_provider(known_providers()), {**options, "device_id": str(index)}), CPU.providers[0]), reason, _hardware(index))


def _hardware(index: int) -> str:
    from scm_runtime.devices.cuda_driver import read_driver  # imports ctypes, as above

    devices = read_driver().devices
    return f"{devices[index].name} {devices[index].compute_capability}" if index < len(devices) else ""


# ----------------------------------------------------------------------------
# providers=


def _pairs(providers: object, provider_options: object) -> list[tuple[str, dict[str, str]]]:
    """Names and options of providers, from the forms that InferenceSession accepts."""
    if isinstance(providers, str) or not isinstance(providers, Sequence) or not providers:
        raise InvalidArgumentError(f"providers must be a list of names or of (name, options), got {providers!r}")
    separate = provider_options is not None
    if separate and (isinstance(provider_options, str | Mapping) or not isinstance(provider_options, Sequence) or len(provider_options) != len(providers)):
        raise InvalidArgumentError(f"provider_options must be a list of {len(providers)} mappings, one per provider, got {provider_options!r}")
    pairs = []
    for number, provider in enumerate(providers):
        name, options = (provider, {}) if isinstance(provider, str) else (*provider, None)[:2] if _is_pair(provider) else (None, None)
        if isinstance(provider_options, Sequence):
            if not isinstance(provider, str):
                raise InvalidArgumentError(f"with provider_options, providers must be names only, got {provider!r}")
            options = provider_options[number]
        if not isinstance(name, str) or not isinstance(options, Mapping):
            raise InvalidArgumentError(f"a provider must be a name or (name, options), with the options a mapping, got {provider!r} and {options!r}")
        pairs.append((name, _strings(name, options)))
    known = known_providers()
    if unknown := [name for name, _ in pairs if name not in known]:
        raise InvalidArgumentError(f"this ONNX Runtime has no provider {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    return pairs


def _is_pair(provider: object) -> bool:
    return isinstance(provider, tuple | list) and len(provider) == 2


def _strings(name: str, options: Mapping[str, object]) -> dict[str, str]:
    if not all(isinstance(key, str) for key in options):
        raise InvalidArgumentError(f"the options of {name} must have strings for names, got {dict(options)!r}")
    return {key: str(value) for key, value in options.items()}


def _place_providers(pairs: list[tuple[str, dict[str, str]]]) -> Placement:
    first, options = pairs[0]
    hardware = ""
    if first in CUDA_PROVIDERS:
        index = int(options["device_id"]) if options.get("device_id", "").isascii() and options.get("device_id", "").isdigit() else 0
        if reason := provider_unavailable_reason(first, index, with_cudnn=False):
            raise DeviceError(f"providers={[name for name, _ in pairs]} is not available: {reason}")
        hardware = _hardware(index)
    if CPU_PROVIDER not in (name for name, _ in pairs):
        pairs = [*pairs, CPU.providers[0]]
    return Placement(first.removesuffix("ExecutionProvider").lower(), tuple(pairs), f"providers={[name for name, _ in pairs]}", hardware)
