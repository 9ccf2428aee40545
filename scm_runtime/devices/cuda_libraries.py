"""The CUDA libraries that a provider of ONNX Runtime needs: their names, whether they load, and the packages of the missing ones.

Each library is loaded into the process, by the dynamic loader or from NVIDIA's Python packages, which the loader does not search. ONNX Runtime then finds
it already loaded. ``onnxruntime.preload_dlls`` does the same for a fixed list, but prints what is missing to stdout.
"""

from __future__ import annotations

import ctypes
import re
import struct
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from scm_runtime.common.memory import MORE_MEMORY, memory_errors

DRIVER = "libcuda.so.1"
CUDNN = "libcudnn.so.9"  # ONNX Runtime 1.31 is not linked with it but opens it by name, for convolutions among others
VENDOR = re.compile(r"lib(cu|nv)\w+\.so\.\d+")

# Python package of each library. {cuda} is CUDA's major version, {suffix} is empty from CUDA 13 on, {version} is the library's version.
PACKAGES = {
    "cudart": "nvidia-cuda-runtime{suffix}~={cuda}.0",
    "cublas": "nvidia-cublas{suffix}~={cuda}.0",
    "cublasLt": "nvidia-cublas{suffix}~={cuda}.0",
    "nvrtc": "nvidia-cuda-nvrtc{suffix}~={cuda}.0",
    "curand": "nvidia-curand{suffix}",
    "cufft": "nvidia-cufft{suffix}",
    "cudnn": "nvidia-cudnn-cu{cuda}",
    "nvinfer": "tensorrt-cu{cuda}~={version}.0",
    "nvonnxparser": "tensorrt-cu{cuda}~={version}.0",
}

PT_LOAD, PT_DYNAMIC, DT_NULL, DT_NEEDED, DT_STRTAB = 1, 2, 0, 1, 5


class Library(NamedTuple):
    """A library, after the attempt to load it."""

    name: str
    """Name that the provider is linked with: "libcublas.so.13"."""
    path: str | None
    """Path in a Python package; None if the loader found it, or if it is missing."""
    error: str | None
    """Why it cannot be loaded; None if it is loaded."""
    package: str | None
    """Requirement for ``pip install`` of the package that contains it; None if there is none."""


def provider_library(onnxruntime: Path, provider: str) -> Path | None:
    """Path of a provider's library in the folder of the package onnxruntime; None if the provider has no separate library."""
    path = onnxruntime / "capi" / f"libonnxruntime_providers_{provider.removesuffix('ExecutionProvider').lower()}.so"
    return path if path.is_file() else None


def vendor_libraries(path: Path) -> tuple[str, ...]:
    """Names of NVIDIA's libraries that a provider's library is linked with, except the driver, and of cuDNN. Empty if it is not a 64-bit ELF file."""
    try:
        with path.open("rb") as file:
            names = [name for name in needed_names(file) if VENDOR.fullmatch(name) and name != DRIVER]
    except (OSError, struct.error, ValueError):
        return ()
    return tuple(dict.fromkeys([*names, CUDNN])) if names else ()


def cuda_major(names: Iterable[str]) -> int | None:
    """CUDA's major version, from the names of libraries: 13 for libcudart.so.13. Some libraries, as libcurand.so.10, have versions of their own."""
    found = [re.fullmatch(r"lib(?:cudart|cublas|cublasLt)\.so\.(\d+)", name) for name in names]
    return next((int(match[1]) for match in found if match), None)


def is_cudnn(name: str) -> bool:
    """Return True for the name of cuDNN's library. A provider that is not linked with it loads it when a graph needs it."""
    return name.startswith("libcudnn.")


def load(names: Iterable[str], cuda: int | None = None) -> list[Library]:
    """Load libraries into this process for its lifetime. Those that cannot be loaded have an ``error``. Raises OutOfMemoryError if memory runs out.

    Args:
        names: names of the libraries.
        cuda: CUDA's major version; by default that of the names.
    """
    names = list(names)
    major = cuda or cuda_major(names)
    return [Library(name, *_load_one(name), _package(name, major)) for name in names]


def install_command(missing: Iterable[Library]) -> str | None:
    """pip command for missing libraries; None if no package contains them."""
    packages = dict.fromkeys(library.package for library in missing if library.package)
    return "pip install " + " ".join(f"'{package}'" if "~" in package else package for package in packages) if packages else None


def _load_one(name: str) -> tuple[str | None, str | None]:
    """Load a library; return its path in a Python package, and the error."""
    reason = None
    for path in chain([name], map(str, _candidates(name))):
        try:
            with memory_errors(f"the library {name}", MORE_MEMORY):
                ctypes.CDLL(path)
            return None if path == name else path, None
        except OSError as error:
            reason = str(error)
    return None, reason


def _candidates(name: str) -> Iterator[Path]:
    for folder in dict.fromkeys(sys.path):
        packages = Path(folder or ".")
        try:
            yield from sorted(packages.glob(f"nvidia/*/lib/{name}"))
            yield from packages.glob(f"tensorrt_libs/{name}")
        except OSError:
            continue


def _package(name: str, major: int | None) -> str | None:
    stem, version = name.removeprefix("lib").split(".so.")
    template = PACKAGES.get(stem)
    return None if template is None or major is None else template.format(cuda=major, version=version, suffix="" if major >= 13 else f"-cu{major}")


def needed_names(file: BinaryIO) -> list[str]:
    """Names of the libraries that a 64-bit little-endian ELF file is linked with: its DT_NEEDED entries (System V ABI, chapters 4 and 5).

    Raises ValueError or struct.error if it is not such a file.
    """
    header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (start,) = struct.unpack_from("<Q", header, 32)
    size, count = struct.unpack_from("<HH", header, 54)
    file.seek(start)
    table = file.read(size * count)
    segments = [struct.unpack_from("<IIQQQQ", table, size * number) for number in range(count)]
    loads = [(address, offset, length) for kind, _, offset, address, _, length in segments if kind == PT_LOAD]
    dynamic = next(((offset, length) for kind, _, offset, _, _, length in segments if kind == PT_DYNAMIC), None)
    if dynamic is None:
        return []
    file.seek(dynamic[0])
    entries = []
    for tag, value in struct.iter_unpack("<qQ", file.read(dynamic[1])):
        if tag == DT_NULL:
            break
        entries.append((tag, value))
    strings = next(value for tag, value in entries if tag == DT_STRTAB)
    at = next((offset + strings - address for address, offset, length in loads if address <= strings < address + length), None)
    if at is None:
        raise ValueError("the string table is in no segment")
    names = []
    for tag, value in entries:
        if tag == DT_NEEDED:
            file.seek(at + value)
            names.append(file.read(256).split(b"\0")[0].decode("ascii"))
    return names
