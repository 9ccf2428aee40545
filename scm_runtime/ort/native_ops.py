"""The library of native kernels: where it lies, and whether the graphs of a bundle can use it.

It is not loaded here: session.py hands its path to ONNX Runtime. Where it cannot be used, the function bodies in the graphs compute the same.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from scm_runtime.bundle.manifest import OPS_DOMAIN, Manifest
from scm_runtime.devices.placement import CPU, Placement
from scm_runtime.errors import InferenceError, InvalidArgumentError, NativeOpsError

NativeOps = bool | Literal["auto"]
Opened = TypeVar("Opened")

FOLDER = "_native"
FACTS = "scm_ops.json"
LIBRARY = {"win32": "scm_ops.dll", "darwin": "libscm_ops.dylib"}.get(sys.platform, "libscm_ops.so")

# A configuration entry of sessions on the CPU, in the words of torch.set_float32_matmul_precision: how convolutions and matrix products over feature maps
# compute where the processor multiplies bfloat16. "high" takes each float32 for a sum of two bfloat16, on matrix units (AMX) alone; "medium" for one, also in
# vectors (AVX512-BF16). "highest" leaves them to ONNX Runtime, as every other processor does.
MATMUL_PRECISION = "scm.float32_matmul_precision"
PRECISIONS = ("highest", "high", "medium")

_log = logging.getLogger("scm_runtime")


class CudaFacts(Struct, frozen=True):
    """The toolkit's version, and the architectures there is machine code for: "90" is compute capability 9.0."""

    version: str
    architectures: tuple[str, ...]


class LibraryFacts(Struct, frozen=True, kw_only=True):
    """``scm_ops.json``: what the build wrote down about the library."""

    version: str
    """Of the scm-runtime it was built from."""
    ops: dict[str, int]
    """Version of the operator set, by domain."""
    ort_api: int
    """18: ONNX Runtime 1.18 is the oldest that can load it."""
    ort_headers: str
    cuda: CudaFacts | None
    """None: it has no CUDA kernels."""
    compiler: str


class Library(NamedTuple):
    """The library on disk."""

    path: Path
    facts: LibraryFacts


class Kernels(NamedTuple):
    """Whether the kernels run, for ``Generator.info``: the library, or the reason why it is not used."""

    library: Library | None
    reason: str | None


def find_library() -> Library | None:
    """The library of this installation; None where there is none.

    Raises:
        NativeOpsError: what the build wrote down about it is missing or cannot be read.
    """
    package = sys.modules[__name__.partition(".")[0]]
    # An editable install has two folders: the library lies in site-packages, the sources do not.
    for folder in map(Path, package.__path__):
        path, facts = folder / FOLDER / LIBRARY, folder / FOLDER / FACTS
        if path.is_file():
            try:
                return Library(path, msgspec.json.decode(facts.read_bytes(), type=LibraryFacts))
            except (OSError, msgspec.DecodeError) as error:
                raise NativeOpsError(f"'{facts}', which tells of the library of native kernels, cannot be read: {error}. Install scm-runtime again.") from error
    return None


def check_native_ops(native_ops: object) -> NativeOps:
    """The argument as given, once it is known to be True, False or "auto"."""
    if isinstance(native_ops, bool) or native_ops == "auto":
        return native_ops
    raise InvalidArgumentError(f"native_ops must be True, False or 'auto', got {native_ops!r}")


def check_precision(precision: object) -> str:
    """The value of the entry ``MATMUL_PRECISION`` as given, once it is known to be one of torch's. Raises InvalidArgumentError."""
    if isinstance(precision, str) and precision in PRECISIONS:
        return precision
    raise InvalidArgumentError(f"session_options: {MATMUL_PRECISION} must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def open_with_kernels(
    manifest: Manifest, native_ops: NativeOps, placement: Placement, open_graphs: Callable[[Library | None], Opened]
) -> tuple[Opened, Kernels]:
    """Open a bundle's graphs with the kernels where that can be, else without.

    Args:
        manifest: of the bundle.
        native_ops: True: with the kernels or not at all; False: without; "auto": with them if it works, and a line in the log if not.
        placement: where they will run; there are kernels for the CPU and, in a library that was built with them, for CUDA.
        open_graphs: opens them all, with the library registered or without.

    Raises:
        NativeOpsError: native_ops is True, and the kernels cannot be used.
        InferenceError: ONNX Runtime refuses the graphs themselves.
    """
    if native_ops is False:
        return open_graphs(None), Kernels(None, "native_ops=False")
    level = logging.DEBUG
    try:
        library = find_library()
        reason = _why_not(manifest, library, placement)
        if reason is None:
            return open_graphs(library), Kernels(library, None)
    except (NativeOpsError, InferenceError) as error:  # there is no fallback inside a session: all are opened again
        if native_ops is True:
            raise
        level, reason = logging.WARNING, str(error)
    if native_ops is True:
        raise NativeOpsError(f"native_ops=True, but {reason}")
    opened = open_graphs(None)
    _log_once(level, f"the function bodies run instead of the native kernels: {reason}")
    return opened, Kernels(None, reason)


def usable_on_cpu(manifest: Manifest) -> Library | None:
    """The library, if a bundle's graphs can use it on the CPU. Raises NativeOpsError where it is there and damaged."""
    library = find_library()
    return library if _why_not(manifest, library, CPU) is None else None


def _why_not(manifest: Manifest, library: Library | None, placement: Placement) -> str | None:
    """Why a bundle's graphs cannot use a library, and what would mend it; None where they can."""
    bundle, ops = f"the bundle {manifest.name!r}", manifest.ops
    if not ops:
        return f"{bundle} holds no {OPS_DOMAIN}:: operators. Export its checkpoint again, without --no-custom-ops."
    if library is None:
        return (
            f"this installation has no {FOLDER}/{LIBRARY}. Build it: pip install --force-reinstall --no-cache-dir --no-deps scm-runtime, "
            f"where SCM_REQUIRE_OPS=1 shows why it cannot be built; in the repository: make ops"
        )
    has = library.facts.ops
    if any(has.get(domain) != version for domain, version in ops.items()):
        newer = any(version > has.get(domain, 0) for domain, version in ops.items())
        remedy = "Upgrade scm-runtime." if newer else "Export its checkpoint again."
        return f"{bundle} has operators of {_listed(ops)}, and '{library.path}' kernels for {_listed(has)}. {remedy}"
    return _why_not_there(library, placement)


def _why_not_there(library: Library, placement: Placement) -> str | None:
    """Why a library has no kernels for a device; None where it has."""
    if placement.device == "cpu":
        return None
    if placement.index is None:
        return f"there are kernels for the CPU and for CUDA, and none for {placement.providers[0][0]}"
    build = "SCM_OPS_CUDA=ON pip install --force-reinstall --no-cache-dir --no-deps scm-runtime; in the repository: make ops SCM_OPS_CUDA=ON"
    if (cuda := library.facts.cuda) is None:
        return f"'{library.path}' was built without CUDA kernels. Build them, with nvcc 12 or newer: {build}"
    from scm_runtime.devices.cuda_driver import read_driver  # ctypes is for those with a GPU

    driver = read_driver()
    if driver.cuda_major is not None and driver.cuda_major < int(cuda.version.partition(".")[0]):
        older = f"the NVIDIA driver runs {driver.cuda_version} and older"
        return f"'{library.path}' was built with CUDA {cuda.version}, and {older}. Update it, or build with that CUDA: {build}"
    oldest = min(map(int, cuda.architectures))
    if placement.index < len(driver.devices):
        device = driver.devices[placement.index]
        if int(device.compute_capability.replace(".", "")) < oldest:
            return f"'{library.path}' has kernels for compute capability {oldest / 10} and newer, and {device.name} has {device.compute_capability}"
    return None


def _listed(ops: dict[str, int]) -> str:
    return ", ".join(f"{domain}:: version {version}" for domain, version in sorted(ops.items())) or "no domain"


@cache
def _log_once(level: int, message: str) -> None:
    _log.log(level, message)
