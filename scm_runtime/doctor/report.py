"""The report of ``scm-runtime doctor``. Its types define the JSON document."""

from __future__ import annotations

import msgspec
from msgspec import Struct


class Problem(Struct, frozen=True):
    """Something that does not work."""

    what: str
    reason: str
    """Ends with the remedy if one is known."""


class Provider(Struct, frozen=True):
    """One of ONNX Runtime's providers, and whether it works."""

    name: str
    works: bool | None
    """None if it was not tried."""
    reason: str | None
    """Why it does not work or was not tried; None if it works."""
    milliseconds: float | None
    """Time of the second call, for ten digits in two steps; None unless the provider works."""
    nodes: dict[str, int] = {}
    """Number of nodes of the step graph by the provider that runs them; empty if no session was opened."""


class Gpu(Struct, frozen=True):
    """A GPU, as NVIDIA's driver describes it."""

    index: int
    name: str
    compute_capability: str
    memory_bytes: int


class CudaLibrary(Struct, frozen=True):
    """A library that ONNX Runtime's CUDA provider needs."""

    name: str
    found: bool
    path: str | None
    """Path in a Python package; None if the system's loader found it, or if it is missing."""
    package: str | None
    """Requirement for ``pip install`` of the package that contains it; None if there is none."""


class Cuda(Struct, frozen=True):
    """NVIDIA's driver, devices and libraries. Only ``usable`` and ``reason`` are set if this ONNX Runtime has no CUDA provider."""

    usable: bool
    reason: str | None
    """Why CUDA is not usable; None if it is."""
    driver: str | None
    """Newest CUDA version that the driver supports: "13.2"."""
    devices: tuple[Gpu, ...] = ()
    libraries: tuple[CudaLibrary, ...] = ()
    install: str | None = None
    """pip command for the missing libraries; None if none are missing."""


class Ops(Struct, frozen=True):
    """The library of native kernels."""

    path: str | None
    """None if there is no library."""
    version: str | None = None
    ops: dict[str, int] = {}
    """Version of the operators by domain."""
    cuda: str | None = None
    """Version of the CUDA toolkit that its kernels were built with; None if it has no CUDA kernels."""
    runs: dict[str, bool] = {}
    """Whether the kernels run, by device."""
    reason: str | None = None
    """Why the kernels do not run on a device; None if they run on all."""


class Cache(Struct, frozen=True):
    """The folder of optimized graphs."""

    folder: str | None
    """None if there is none. With a ``reason`` of None, the cache is turned off: SCM_CACHE_DIR is empty."""
    writable: bool
    size_bytes: int
    reason: str | None = None
    """Why the folder cannot be used."""


class Threads(Struct, frozen=True):
    """CPU cores, and environment variables that change which cores, instruction sets and GPUs are used."""

    cores: int
    """Number of cores of the machine."""
    available: int
    """Number of cores that this process may use."""
    variables: dict[str, str]


class Report(Struct, frozen=True):
    """Everything that ``scm-runtime doctor`` found."""

    works: bool
    """True if at least one provider can sample."""
    versions: dict[str, str | None]
    onnxruntime_wheels: dict[str, str]
    """Versions of the installed ONNX Runtime wheels, by name."""
    providers: tuple[Provider, ...]
    cuda: Cuda
    native_ops: Ops
    cache: Cache
    threads: Threads
    problems: tuple[Problem, ...]

    def to_json(self) -> bytes:
        """The JSON document that ``scm-runtime doctor --json`` prints."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)
