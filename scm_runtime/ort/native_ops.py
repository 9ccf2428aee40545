"""The library of native kernels: where it is installed, and whether a bundle's graphs can use it.

The library is not loaded here: ONNX Runtime loads it when ``open_session`` opens a graph. Without it, the function bodies in the graphs compute the same
results.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from scm_runtime.bundle.manifest import OPS_DOMAIN, Manifest
from scm_runtime.common.log import log_once
from scm_runtime.devices.placement import CPU, Placement
from scm_runtime.errors import InferenceError, InvalidArgumentError, NativeOpsError

NativeOps = bool | Literal["auto"]
Graphs = TypeVar("Graphs")

FOLDER = "_native"
BUILD_INFO = "scm_ops.json"
LIBRARY = {"win32": "scm_ops.dll", "darwin": "libscm_ops.dylib"}.get(sys.platform, "libscm_ops.so")


class CudaBuild(Struct, frozen=True):
    """The CUDA part of a build."""

    version: str
    """Version of the CUDA toolkit."""
    architectures: tuple[str, ...]
    """Compute capabilities with machine code, without the dot: "90" is 9.0. It also runs on later minor versions of the same major version; "90a" does not."""
    ptx: tuple[str, ...] | None = None
    """Compute capabilities with PTX, which the driver compiles for later ones. None in builds that do not say so: they have it for the newest."""

    def runs_on(self, compute_capability: str, driver_version: int | None) -> bool:
        """Return whether there is code for a GPU.

        Args:
            compute_capability: the GPU's, for example "8.9".
            driver_version: the newest CUDA version that the driver supports, 13020 for 13.2; None if it is not known.
        """
        here = _number(compute_capability.replace(".", ""))
        if any(_runs_on(built, here) for built in self.architectures):
            return True
        major, _, minor = self.version.partition(".")
        if driver_version is not None and driver_version < 1000 * int(major) + 10 * int(minor or 0):
            return False  # a driver compiles PTX of its own CUDA version and of older ones
        ptx = (max(self.architectures, key=_number),) if self.ptx is None else self.ptx
        return any(built.isdigit() and int(built) <= here for built in ptx)  # "90a" is for 9.0 only


class BuildInfo(Struct, frozen=True, kw_only=True):
    """The contents of ``scm_ops.json``, which the build writes beside the library."""

    version: str
    """Version of scm-runtime that the library was built from."""
    ops: dict[str, int]
    """Version of each operator set, by domain."""
    ort_api: int
    """Oldest ONNX Runtime that can load the library: 18 is 1.18."""
    ort_headers: str
    cuda: CudaBuild | None
    """None if the library has no CUDA kernels."""
    compiler: str


class Library(NamedTuple):
    """The native library on disk."""

    path: Path
    info: BuildInfo


class NativeOpsStatus(NamedTuple):
    """The library that the graphs use, or the reason why they use none."""

    library: Library | None
    reason: str | None


def find_library() -> Library | None:
    """Return the library of this installation, or None if it has none.

    Raises:
        NativeOpsError: the library's build information is missing or damaged.
    """
    package = sys.modules[__name__.partition(".")[0]]
    # An editable install has two folders: the library is in site-packages, the sources are not.
    for folder in map(Path, package.__path__):
        path, info = folder / FOLDER / LIBRARY, folder / FOLDER / BUILD_INFO
        if path.is_file():
            try:
                return Library(path, msgspec.json.decode(info.read_bytes(), type=BuildInfo))
            except (OSError, msgspec.DecodeError) as error:
                raise NativeOpsError(f"'{info}', which describes the library of native kernels, cannot be read: {error}. Install scm-runtime again.") from error
    return None


def check_native_ops(native_ops: object) -> NativeOps:
    """Return the argument unchanged. Raises InvalidArgumentError if it is not True, False or "auto"."""
    if isinstance(native_ops, bool) or native_ops == "auto":
        return native_ops
    raise InvalidArgumentError(f"native_ops must be True, False or 'auto', got {native_ops!r}")


def open_with_native_ops(
    manifest: Manifest, native_ops: NativeOps, placement: Placement, open_graphs: Callable[[Library | None], Graphs]
) -> tuple[Graphs, NativeOpsStatus]:
    """Open a bundle's graphs with the native library if possible, otherwise without it.

    Args:
        manifest: the bundle's manifest.
        native_ops: True requires the library; False does not use it; "auto" uses it if possible and logs why if not.
        placement: the device. There are kernels for the CPU and, if the library was built with them, for CUDA.
        open_graphs: opens all graphs, with the given library or without one.

    Raises:
        NativeOpsError: native_ops is True, and the library cannot be used.
        InferenceError: ONNX Runtime cannot open the graphs without the library either.
    """
    if native_ops is False:
        return open_graphs(None), NativeOpsStatus(None, "native_ops=False")
    level = logging.DEBUG
    try:
        library = find_library()
        reason = _unusable_reason(manifest, library, placement)
        if reason is None:
            return open_graphs(library), NativeOpsStatus(library, None)
        if placement.index is not None:
            level = logging.INFO  # on a GPU, the function bodies take several times as long
    except (NativeOpsError, InferenceError) as error:  # a session has no fallback, so all graphs are opened again
        if native_ops is True:
            raise
        level, reason = logging.WARNING, str(error)
    if native_ops is True:
        raise NativeOpsError(f"native_ops=True, but {reason}")
    graphs = open_graphs(None)
    log_once(level, f"the function bodies run instead of the native kernels: {reason}")
    return graphs, NativeOpsStatus(None, reason)


def usable_on_cpu(manifest: Manifest) -> Library | None:
    """Return the library if a bundle's graphs can use it on the CPU, else None. Raises NativeOpsError if the library is damaged."""
    library = find_library()
    return library if _unusable_reason(manifest, library, CPU) is None else None


def _unusable_reason(manifest: Manifest, library: Library | None, placement: Placement) -> str | None:
    """Return why a bundle's graphs cannot use a library, with the remedy, or None if they can."""
    bundle, ops = f"the bundle {manifest.name!r}", manifest.ops
    if not ops:
        return f"{bundle} contains no {OPS_DOMAIN}:: operators. Export its checkpoint again, without --no-custom-ops."
    if library is None:
        return (
            f"this installation has no {FOLDER}/{LIBRARY}. Build it in a clone of scm-runtime: pip install --force-reinstall --no-deps ., "
            "where SCM_REQUIRE_OPS=1 shows why it cannot be built; or make ops for the clone's own environment"
        )
    has = library.info.ops
    if any(has.get(domain) != version for domain, version in ops.items()):
        newer = any(version > has.get(domain, 0) for domain, version in ops.items())
        remedy = "Upgrade scm-runtime." if newer else "Export its checkpoint again."
        return f"{bundle} needs operators of {_listed(ops)}, but '{library.path}' has kernels for {_listed(has)}. {remedy}"
    return _unsupported_device_reason(library, placement)


def _unsupported_device_reason(library: Library, placement: Placement) -> str | None:
    """Return why a library has no kernels for a device, with the remedy, or None if it has them."""
    if placement.device == "cpu":
        return None
    if placement.index is None:
        return f"there are kernels for the CPU and for CUDA, and none for {placement.providers[0][0]}"
    build = "in a clone of scm-runtime, SCM_OPS_CUDA=ON pip install --force-reinstall --no-deps ., or make ops SCM_OPS_CUDA=ON for the clone's own environment"
    if (cuda := library.info.cuda) is None:
        return f"'{library.path}' was built without CUDA kernels. Build them, with nvcc 12 or newer: {build}"
    from scm_runtime.devices.cuda_driver import read_driver  # imports ctypes, which only a GPU needs

    driver = read_driver()
    if driver.cuda_major is not None and driver.cuda_major < int(cuda.version.partition(".")[0]):
        supported = f"the NVIDIA driver supports CUDA up to {driver.cuda_version}"
        return f"'{library.path}' was built with CUDA {cuda.version}, and {supported}. Update it, or build with that CUDA: {build}"
    if placement.index < len(driver.devices):
        device = driver.devices[placement.index]
        if not cuda.runs_on(device.compute_capability, driver.version):
            return f"'{library.path}' has {_capabilities(cuda)}, and {device.name} has {device.compute_capability}. Build it there: {build}"
    return None


def _capabilities(cuda: CudaBuild) -> str:
    """Describe for which GPUs a build has code: "kernels for compute capability 8.0, 9.0 and newer"."""
    built = sorted(_number(name) for name in (*cuda.architectures, *(cuda.ptx or ())))
    newer = " and newer" if cuda.ptx is None or any(name.isdigit() for name in cuda.ptx) else ""
    return f"kernels for compute capability {', '.join(str(number / 10) for number in dict.fromkeys(built))}{newer}"


def _runs_on(architecture: str, here: int) -> bool:
    """Return whether machine code for an architecture runs on a compute capability, 90 for 9.0."""
    built = _number(architecture)
    return built == here if architecture.endswith("a") else built // 10 == here // 10 and built <= here


def _number(architecture: str) -> int:
    """Return 90 for "90" and "90a"."""
    return int(architecture.rstrip("af"))


def _listed(ops: dict[str, int]) -> str:
    return ", ".join(f"{domain}:: version {version}" for domain, version in sorted(ops.items())) or "no domain"
