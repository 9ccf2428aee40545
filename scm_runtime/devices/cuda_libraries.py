"""The CUDA libraries that a provider of ONNX Runtime is linked with: which they are, whether they load, and which package has the missing ones.

Each is loaded, from where the dynamic loader finds it or from NVIDIA's Python packages, which the loader does not know: ONNX Runtime then finds it
loaded, under its name. ``onnxruntime.preload_dlls`` does the same for a list of its own, and prints what it misses on the host's stdout.
"""

from __future__ import annotations

import ctypes
import re
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

DRIVER = "libcuda.so.1"
CUDNN = "libcudnn.so.9"  # ONNX Runtime 1.31 is not linked with it but opens it by name, for convolutions among others
VENDOR = re.compile(r"lib(cu|nv)\w+\.so\.\d+")

# Python packages of libraries; {suffix} is empty from CUDA 13 on, {own} is the library's own version.
PACKAGES = {
    "cudart": "nvidia-cuda-runtime{suffix}~={cuda}.0",
    "cublas": "nvidia-cublas{suffix}~={cuda}.0",
    "cublasLt": "nvidia-cublas{suffix}~={cuda}.0",
    "nvrtc": "nvidia-cuda-nvrtc{suffix}~={cuda}.0",
    "curand": "nvidia-curand{suffix}",
    "cufft": "nvidia-cufft{suffix}",
    "cudnn": "nvidia-cudnn-cu{cuda}",
    "nvinfer": "tensorrt-cu{cuda}~={own}.0",
    "nvonnxparser": "tensorrt-cu{cuda}~={own}.0",
}

PT_LOAD, PT_DYNAMIC, DT_NULL, DT_NEEDED, DT_STRTAB = 1, 2, 0, 1, 5


class Library(NamedTuple):
    """One library."""

    name: str
    """As the provider asks for it: "libcublas.so.13"."""
    path: str | None
    """Of the Python package's file; None where the loader found it, or it is missing."""
    error: str | None
    """Why it cannot be loaded; None: it is."""
    package: str | None
    """What ``pip install`` takes to get it, where there is such a package."""


def provider_library(onnxruntime: Path, provider: str) -> Path | None:
    """The library of a provider ("CUDAExecutionProvider") in the folder of the package onnxruntime; None where it has none of its own."""
    path = onnxruntime / "capi" / f"libonnxruntime_providers_{provider.removesuffix('ExecutionProvider').lower()}.so"
    return path if path.is_file() else None


def vendor_libraries(path: Path) -> tuple[str, ...]:
    """NVIDIA's libraries that a provider's library is linked with, other than the driver, and cuDNN. Empty for what is no ELF file of 64 bits."""
    try:
        with path.open("rb") as file:
            names = [name for name in needed(file) if VENDOR.fullmatch(name) and name != DRIVER]
    except (OSError, struct.error, ValueError):
        return ()
    return tuple(dict.fromkeys([*names, CUDNN])) if names else ()


def cuda_major(names: Iterable[str]) -> int | None:
    """The CUDA that libraries are of: 13 for libcudart.so.13. Others, as libcurand.so.10, count for themselves."""
    found = [re.fullmatch(r"lib(?:cudart|cublas|cublasLt)\.so\.(\d+)", name) for name in names]
    return next((int(match[1]) for match in found if match), None)


def load(names: Iterable[str]) -> list[Library]:
    """Load libraries into this process, where they stay; what cannot be loaded has an ``error``."""
    names = list(names)
    major = cuda_major(names)
    return [Library(name, *_load_one(name), _package(name, major)) for name in names]


def install_command(missing: Iterable[Library]) -> str | None:
    """The pip command for libraries; None where no package has them."""
    packages = dict.fromkeys(library.package for library in missing if library.package)
    return "pip install " + " ".join(f"'{package}'" if "~" in package else package for package in packages) if packages else None


def _load_one(name: str) -> tuple[str | None, str | None]:
    """Path and error."""
    try:
        ctypes.CDLL(name)
        return None, None
    except OSError as error:
        reason = str(error)
    for path in _candidates(name):
        try:
            ctypes.CDLL(str(path))
            return str(path), None
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
    stem, own = name.removeprefix("lib").split(".so.")
    template = PACKAGES.get(stem)
    return None if template is None or major is None else template.format(cuda=major, own=own, suffix="" if major >= 13 else f"-cu{major}")


def needed(file: BinaryIO) -> list[str]:
    """DT_NEEDED of an ELF file: 64 bits, little-endian. Raises ValueError, struct.error: it is none. (System V ABI, chapters 4 and 5.)"""
    header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no ELF file of 64 bits, little-endian")
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
        raise ValueError("the table of names lies in no segment")
    names = []
    for tag, value in entries:
        if tag == DT_NEEDED:
            file.seek(at + value)
            names.append(file.read(256).split(b"\0")[0].decode("ascii"))
    return names
