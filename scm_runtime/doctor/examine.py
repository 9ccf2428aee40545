"""Diagnose the installation: what is installed, which devices can sample, what is missing, and how to install it.

A provider works if it samples the embedded bundle ``digits`` correctly and runs at least one node itself, instead of leaving all of them to the CPU.
Failures do not raise: each is a ``Problem`` of the report.
"""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scm_runtime._version import __version__
from scm_runtime.bundle.location import DIGITS, EMBEDDED
from scm_runtime.common.installed import install_extras, installed_version
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.devices.cpu import available_cores
from scm_runtime.devices.placement import CPU_PROVIDER, CUDA_PROVIDER, cuda_provider, cuda_unavailable_reason, known_providers, needed_libraries
from scm_runtime.doctor.report import Cache, Cuda, CudaLibrary, Gpu, Ops, Problem, Provider, Report, Threads
from scm_runtime.errors import MissingDependencyError, ScmError

GOLDEN = EMBEDDED / "digits.golden.png"
SEEDS = tuple(range(10))
STEPS = 2
MAX_LEVELS, MAX_SHARE = 2, 0.01  # devices round differently: at most 1 % of the pixels may differ by more than 2 of 255 levels

# Wheels that install into the folder onnxruntime, each with different providers.
WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-webgpu", "onnxruntime-qnn")
CACHE_REMEDY = "Set SCM_CACHE_DIR to a folder that only you can write to, or turn the cache off: SCM_CACHE_DIR=''"
REMOTE = {"AzureExecutionProvider": "it calls a service and computes nothing here"}
ENVIRONMENT_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SCM_OPS_MAX_ISA")


def examine() -> Report:
    """Examine the installation. This takes seconds; longer if a provider compiles graphs."""
    problems: list[Problem] = []
    wheels = {name: version for name in WHEELS if (version := installed_version(name))}
    version, available, failure = _onnxruntime()
    if failure:
        problems.append(Problem("ONNX Runtime cannot be used", failure))
    cuda_name = cuda_provider(available)
    providers = tuple(_try_provider(name, as_device=name == cuda_name) for name in available)
    problems += [Problem(f"{provider.name} does not work", provider.reason) for provider in providers if provider.works is False and provider.reason]
    cuda = _cuda(available, cuda_name)
    if cuda.install:
        problems.append(Problem("CUDA libraries are missing", f"Install them: {cuda.install}"))
    ops = _ops(providers, cuda_name)
    if ops.reason and not failure:
        problems.append(Problem("the native kernels do not run on every device; the function bodies in the graphs compute the same, slower", ops.reason))
    cache = _cache()
    if cache.reason:
        problems.append(Problem("optimized graphs cannot be cached, so that bundles open more slowly", cache.reason))
    variables = {name: value for name in ENVIRONMENT_VARIABLES if (value := os.environ.get(name)) is not None}
    return Report(
        works=any(provider.works for provider in providers),
        versions={
            "scm_runtime": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "onnxruntime": version,
            **{name: installed_version(name) for name in ("numpy", "msgspec", "pillow", "cuda-core", "cuda-bindings")},
        },
        onnxruntime_wheels=wheels,
        providers=providers,
        cuda=cuda,
        native_ops=ops,
        cache=cache,
        threads=Threads(os.cpu_count() or 1, available_cores(), variables),
        problems=tuple(problems),
    )


def golden_mismatch(pixels: NDArray[np.uint8]) -> str | None:
    """Describe how ten digits, uint8 ``[10, H, W, 1]``, differ from the golden image; None if they match."""
    from PIL import Image

    try:
        with Image.open(GOLDEN) as image:
            golden = np.asarray(image.convert("L"))
    except OSError as error:
        return f"the golden image cannot be read: {error}. Install scm-runtime again."
    strip = np.concatenate(list(pixels[..., 0]), axis=1)
    if strip.shape != golden.shape:
        return f"the pixels have the shape {strip.shape}, and those of '{GOLDEN}' {golden.shape}. Install scm-runtime again."
    share = float(np.mean(np.abs(strip.astype(int) - golden) > MAX_LEVELS))
    return None if share <= MAX_SHARE else f"it samples wrong pixels: {share:.1%} of them differ by more than {MAX_LEVELS} levels from the golden image"


def _onnxruntime() -> tuple[str | None, list[str], str | None]:
    """Return ONNX Runtime's version and providers, and why it cannot be used."""
    try:
        ort = load_onnxruntime()
        ort.set_default_logger_severity(4)  # errors are in the report; ONNX Runtime would print them, too
        return ort.__version__, known_providers(), None
    except MissingDependencyError as error:
        return None, [], str(error)
    except Exception as error:  # noqa: BLE001  # a broken installation may raise anything
        return None, [], f"{_error_text(error)}. Install it again: {install_extras('cpu')} --force-reinstall"


def _try_provider(name: str, *, as_device: bool) -> Provider:
    """Sample digits with a provider, and check which provider runs the step graph's nodes. ``as_device``: with device="cuda:0"."""
    from scm_runtime.generator import Generator

    if name in REMOTE:
        return Provider(name, None, REMOTE[name], None)
    try:
        # CUDA as a caller uses it, with scm-runtime's own engine; other providers as ONNX Runtime runs them.
        device: dict[str, Any] = {"device": "cuda:0"} if as_device else {"providers": [name]}
        with Generator(DIGITS, dtype="fp32", cache_dir=False, **device) as generator:
            nodes = generator.info.nodes
            pixels = generator(seed=SEEDS, num_inference_steps=STEPS, output_type="np").array
            start = time.perf_counter()
            generator(seed=SEEDS, num_inference_steps=STEPS, output_type="np")
            milliseconds = (time.perf_counter() - start) * 1e3
        reason = golden_mismatch(np.asarray(pixels))
        if reason is None and not nodes.get(name):
            reason = f"none of the {sum(nodes.values())} nodes of the step graph ran on it, but on {', '.join(sorted(nodes)) or 'nothing'}"
    except Exception as error:  # noqa: BLE001  # one provider's failure must not stop the examination
        return Provider(name, False, _error_text(error), None)
    return Provider(name, reason is None, reason, None if reason else round(milliseconds, 1), dict(nodes))


def _cuda(available: list[str], name: str) -> Cuda:
    """Describe the driver, its devices and the libraries, if ONNX Runtime has a CUDA provider."""
    if name not in available:
        return Cuda(usable=False, reason=f"this ONNX Runtime has no {CUDA_PROVIDER}" if available else "there is no ONNX Runtime", driver=None)
    try:
        from scm_runtime.devices.cuda_driver import read_driver
        from scm_runtime.devices.cuda_libraries import install_command, load

        driver, libraries, reason = read_driver(), load(needed_libraries(name)), cuda_unavailable_reason()
    except Exception as error:  # noqa: BLE001  # as above
        return Cuda(usable=False, reason=_error_text(error), driver=None)
    return Cuda(
        usable=reason is None,
        reason=reason,
        driver=driver.cuda_version,
        devices=tuple(Gpu(device.index, device.name, device.compute_capability, device.memory_bytes) for device in driver.devices),
        libraries=tuple(CudaLibrary(library.name, library.error is None, library.path, library.package) for library in libraries),
        install=install_command([library for library in libraries if library.error is not None]),
    )


def _ops(providers: tuple[Provider, ...], cuda_name: str) -> Ops:
    """Find the native library, and try its kernels on each device that works."""
    from scm_runtime.ort.native_ops import find_library

    try:
        library = find_library()
    except ScmError as error:
        return Ops(None, reason=str(error))
    working = {provider.name for provider in providers if provider.works}
    devices = [device for device, name in (("cpu", CPU_PROVIDER), ("cuda:0", cuda_name)) if name in working]
    failures = {device: _kernels_failure(device) for device in devices}
    reason = next((failure for failure in failures.values() if failure), None)
    if library is None:
        return Ops(None, reason=reason or "this installation has no library")
    facts, runs = library.info, {device: failure is None for device, failure in failures.items()}
    return Ops(str(library.path), facts.version, facts.ops, facts.cuda.version if facts.cuda else None, runs, reason)


def _kernels_failure(device: str) -> str | None:
    """Why the native kernels do not work on a device; None if they do."""
    from scm_runtime.generator import Generator

    try:
        with Generator(DIGITS, device=device, dtype="fp32", native_ops=True, cache_dir=False) as generator:
            return golden_mismatch(np.asarray(generator(seed=SEEDS, num_inference_steps=STEPS, output_type="np").array))
    except Exception as error:  # noqa: BLE001  # as above
        return f"on {device}: {_error_text(error)}"


def _cache() -> Cache:
    """Describe the cache folder. It is created if it does not exist, as a Generator would do."""
    from scm_runtime.cache.folder import look_for_folder, max_bytes
    from scm_runtime.cache.graph_cache import SUBFOLDERS

    try:
        max_bytes()
        folder, reason = look_for_folder(None, SUBFOLDERS)
        if folder is None:
            return Cache(os.environ.get("SCM_CACHE_DIR") or None, writable=False, size_bytes=0, reason=reason)
        size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
        writable = os.access(folder, os.W_OK)
        return Cache(str(folder), writable, size, None if writable else f"'{folder}' is not writable. {CACHE_REMEDY}")
    except (OSError, ScmError) as error:
        return Cache(os.environ.get("SCM_CACHE_DIR") or None, writable=False, size_bytes=0, reason=f"{_error_text(error)}. {CACHE_REMEDY}")


def _error_text(error: Exception) -> str:
    return str(error) if isinstance(error, ScmError) else f"{type(error).__name__}: {error}"
