"""What ``scm-runtime doctor`` finds out: what is installed, what can sample here, what is missing, and how to get it.

A provider counts as working when the embedded bundle ``digits`` comes out of it as it should, computed on it and not silently on the CPU. Nothing that
is looked into raises: what is wrong is a ``Problem`` of the report.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scm_runtime._version import __version__
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.devices.placement import CPU_PROVIDER, CUDA_PROVIDER, needed_libraries, why_no_cuda
from scm_runtime.doctor.report import Cache, Cuda, CudaLibrary, Gpu, Ops, Problem, Provider, Report, Threads
from scm_runtime.errors import MissingDependencyError, ScmError

GOLDEN = Path(__file__).parents[1] / "bundles" / "digits.golden.png"
SEEDS = tuple(range(10))
STEPS = 2
LEVELS, SHARE = 2, 0.01  # another device rounds otherwise: at most 1 % of the pixels may differ by more than 2 of 255 levels

# Wheels that own the folder onnxruntime, each with other providers.
WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-webgpu", "onnxruntime-qnn")
CACHE_REMEDY = "Name a folder of your own, which nobody else can write to, in SCM_CACHE_DIR; or do without: SCM_CACHE_DIR=''"
REMOTE = {"AzureExecutionProvider": "it calls a service and computes nothing here"}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def examine() -> Report:
    """Look into everything. Takes seconds, more where a provider compiles graphs."""
    problems: list[Problem] = []
    wheels = {name: version for name in WHEELS if (version := _version(name))}
    version, available, failure = _onnxruntime()
    if failure:
        problems.append(Problem("ONNX Runtime cannot be used", failure))
    providers = tuple(_try_provider(name) for name in available)
    problems += [Problem(f"{provider.name} does not work", provider.reason) for provider in providers if provider.works is False and provider.reason]
    cuda = _cuda(available)
    if cuda.install:
        problems.append(Problem("CUDA libraries are missing", f"Install them: {cuda.install}"))
    ops = _ops(providers)
    if ops.reason and not failure:
        problems.append(Problem("the native kernels do not run everywhere; the function bodies in the graphs do the same, slower", ops.reason))
    cache = _cache()
    if cache.reason:
        problems.append(Problem("optimised graphs cannot be kept, so that opening a bundle takes longer", cache.reason))
    return Report(
        works=any(provider.works for provider in providers),
        versions={
            "scm_runtime": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "onnxruntime": version,
            **{name: _version(name) for name in ("numpy", "msgspec", "pillow", "cuda-core", "cuda-bindings")},
        },
        onnxruntime_wheels=wheels,
        providers=providers,
        cuda=cuda,
        native_ops=ops,
        cache=cache,
        threads=Threads(os.cpu_count() or 1, _cores(), {name: value for name in THREAD_VARIABLES if (value := os.environ.get(name)) is not None}),
        problems=tuple(problems),
    )


def why_not_golden(pixels: NDArray[np.uint8]) -> str | None:
    """Why ten digits, uint8 ``[10, H, W, 1]``, are not those of the golden picture; None where they are."""
    from PIL import Image

    try:
        with Image.open(GOLDEN) as image:
            golden = np.asarray(image.convert("L"))
    except OSError as error:
        return f"the picture to compare with cannot be read: {error}. Install scm-runtime again."
    strip = np.concatenate(list(pixels[..., 0]), axis=1)
    if strip.shape != golden.shape:
        return f"the pixels have the shape {strip.shape}, and '{GOLDEN}' {golden.shape}. Install scm-runtime again."
    far = float(np.mean(np.abs(strip.astype(int) - golden) > LEVELS))
    return None if far <= SHARE else f"it samples wrong pixels: {far:.1%} of them differ by more than {LEVELS} levels from what they should be"


def _onnxruntime() -> tuple[str | None, list[str], str | None]:
    """Version, providers, and what is wrong."""
    try:
        ort = load_onnxruntime()
        ort.set_default_logger_severity(4)  # what fails stands in the report; ONNX Runtime would print it too
        return ort.__version__, list(ort.get_available_providers()), None
    except MissingDependencyError as error:
        return None, [], str(error)
    except Exception as error:  # noqa: BLE001  # a broken installation fails in any way
        return None, [], f"{_said(error)}. Install it again: pip install --force-reinstall 'scm-runtime[cpu]'   (or [gpu] for CUDA)"


def _try_provider(name: str) -> Provider:
    """Draw digits on a provider, and look where the nodes of the graphs ran."""
    from scm_runtime.generator import Generator

    if name in REMOTE:
        return Provider(name, None, REMOTE[name], None)
    try:
        with tempfile.TemporaryDirectory() as folder:
            # CUDA as callers have it, by scm-runtime's own engine; another provider as ONNX Runtime runs it.
            where: dict[str, Any] = {"device": "cuda:0"} if name == CUDA_PROVIDER else {"providers": [name]}
            with Generator("digits", dtype="fp32", profile_dir=folder, cache_dir=False, **where) as generator:
                pixels = generator(seed=SEEDS, num_inference_steps=STEPS, output_type="np").array
                start = time.perf_counter()
                generator(seed=SEEDS, num_inference_steps=STEPS, output_type="np")
                took = (time.perf_counter() - start) * 1e3
            ran = _nodes(Path(folder))
        reason = why_not_golden(np.asarray(pixels))
        if reason is None and not ran[name]:
            reason = f"none of the {ran.total()} nodes ran on it, but on {', '.join(sorted(ran)) or 'nothing'}"
    except Exception as error:  # noqa: BLE001  # whatever a provider does, the others are tried too
        return Provider(name, False, _said(error), None)
    return Provider(name, reason is None, reason, None if reason else round(took, 1))


def _nodes(folder: Path) -> Counter[str]:
    """How many nodes each provider ran, by ONNX Runtime's profiles."""
    events = [event for path in folder.glob("*.json") for event in json.loads(path.read_bytes())]
    return Counter(event["args"]["provider"] for event in events if event.get("cat") == "Node" and event.get("args", {}).get("provider"))


def _cuda(available: list[str]) -> Cuda:
    """The driver, its devices, and libraries; nothing is looked for where ONNX Runtime has no CUDA."""
    if CUDA_PROVIDER not in available:
        return Cuda(usable=False, reason=f"this ONNX Runtime has no {CUDA_PROVIDER}" if available else "there is no ONNX Runtime", driver=None)
    try:
        from scm_runtime.devices.cuda_driver import read_driver
        from scm_runtime.devices.cuda_libraries import install_command, load

        driver, libraries, reason = read_driver(), load(needed_libraries()), why_no_cuda()
    except Exception as error:  # noqa: BLE001  # as above
        return Cuda(usable=False, reason=_said(error), driver=None)
    return Cuda(
        usable=reason is None,
        reason=reason,
        driver=None if driver.version is None else f"{driver.version // 1000}.{driver.version % 1000 // 10}",
        devices=tuple(Gpu(device.index, device.name, device.compute_capability, device.memory_bytes) for device in driver.devices),
        libraries=tuple(CudaLibrary(library.name, library.error is None, library.path, library.package) for library in libraries),
        install=install_command([library for library in libraries if library.error is not None]),
    )


def _ops(providers: tuple[Provider, ...]) -> Ops:
    """Where the library lies, and on which of the devices that work its kernels run."""
    from scm_runtime.ort.native_ops import find_library

    try:
        library = find_library()
    except ScmError as error:
        return Ops(None, reason=str(error))
    working = {provider.name for provider in providers if provider.works}
    devices = [device for device, name in (("cpu", CPU_PROVIDER), ("cuda:0", CUDA_PROVIDER)) if name in working]
    tried = {device: _why_no_kernels(device) for device in devices}
    reason = next((why for why in tried.values() if why), None)
    if library is None:
        return Ops(None, reason=reason or "this installation has no library")
    facts, runs = library.info, {device: why is None for device, why in tried.items()}
    return Ops(str(library.path), facts.version, facts.ops, facts.cuda.version if facts.cuda else None, runs, reason)


def _why_no_kernels(device: str) -> str | None:
    from scm_runtime.generator import Generator

    try:
        with Generator("digits", device=device, dtype="fp32", native_ops=True, cache_dir=False) as generator:
            return why_not_golden(np.asarray(generator(seed=SEEDS, num_inference_steps=STEPS, output_type="np").array))
    except Exception as error:  # noqa: BLE001  # as above
        return f"on {device}: {_said(error)}"


def _cache() -> Cache:
    """The folder, made if need be as a Generator would."""
    from scm_runtime.cache.folder import look_for_folder, max_bytes
    from scm_runtime.cache.graph_cache import SUBFOLDERS

    try:
        max_bytes()
        folder, reason = look_for_folder(None, SUBFOLDERS)
        if folder is None:
            return Cache(os.environ.get("SCM_CACHE_DIR") or None, writable=False, size_bytes=0, reason=reason)
        size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
        writable = os.access(folder, os.W_OK)
        return Cache(str(folder), writable, size, None if writable else f"'{folder}' cannot be written to. {CACHE_REMEDY}")
    except (OSError, ScmError) as error:
        return Cache(os.environ.get("SCM_CACHE_DIR") or None, writable=False, size_bytes=0, reason=f"{_said(error)}. {CACHE_REMEDY}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ScmError) else f"{type(error).__name__}: {error}"
