"""ONNX Runtime's sessions: opens graphs where they are to run, and runs them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scm_runtime.bundle import hub
from scm_runtime.bundle.manifest import WEIGHTS
from scm_runtime.cache.graph_cache import GraphCache
from scm_runtime.cache.key import graph_key, is_cacheable
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.common.process import leave_to_parent
from scm_runtime.common.runs import Run, RunRegistry, closed_error
from scm_runtime.devices.placement import CPU, Placement
from scm_runtime.errors import DeviceError, InferenceError, InvalidArgumentError, NativeOpsError, OutOfMemoryError, ScmError
from scm_runtime.ort.options import configure

# Of ONNX Runtime, by name: what makes new weights out of those in the file.
COPYING_OPTIMIZERS = ("ConstantFolding", "ConvMulFusion", "NchwcTransformer")


MOST_THREADS = 1024  # every graph has its own

# How ONNX Runtime, its arenas, CUDA and cuDNN say it, in lower case.
OUT_OF_MEMORY = ("allocate memory", "out of memory", "out_of_memory", "bad_alloc", "alloc_failed", "allocation_failed", "smaller than requested bytes")

UNCAPTURED = {"gpu_graph_id": "-1"}  # of a run: the host's arrays have no addresses that a CUDA graph could keep

# Options of a provider that say nothing about the optimised graph, and differ from process to process.
VOLATILE_OPTIONS = ("user_compute_stream", "gpu_mem_limit", "enable_cuda_graph")


@dataclass(frozen=True)
class Cached:
    """A cache of optimised graphs, and what names those of one bundle in it."""

    cache: GraphCache
    sums: Mapping[str, str]
    """SHA-256 of the bundle's files, by name."""
    library: str | None
    """SHA-256 of the library of kernels."""


@dataclass(frozen=True)
class Settings:
    """How a session is opened."""

    placement: Placement = CPU
    """Device and providers."""
    threads: int | None = None
    """Inside an operator; None leaves the choice to ONNX Runtime (one a core)."""
    library: Path | None = None
    """Custom operators; their kernels take the place of the function bodies in the graph, all or none."""
    cached: Cached | None = None
    """Where the optimised graph is kept; None for nowhere."""
    session_options: Mapping[str, object] = field(default_factory=dict)
    """Of ONNX Runtime, for experts: attributes of its SessionOptions by name, and configuration entries, whose names have a dot."""
    profile_dir: Path | None = None
    """Where ONNX Runtime writes a profile of every session when it is closed."""
    frugal: bool = False
    """Slower, but with little more memory than the weights take. Otherwise they are reordered for convolutions, for a moment beside
    a first copy if they are in half precision; and in a graph that holds a step several times, scaled and packed once for each."""
    runs: RunRegistry = field(default_factory=RunRegistry, compare=False, repr=False)
    """Where the session's runs are registered while they are in flight: by default with those of no other."""


class Region(NamedTuple):
    """A tensor in the memory of a device."""

    address: int
    dtype: type[np.generic]
    shape: tuple[int, ...]


class Session:
    """One ONNX graph, ready to run. Safe to call from several threads."""

    def __init__(self, path: Path, settings: Settings | None = None) -> None:
        """Open a graph, the ``.onnx`` file; its external data lie beside it.

        Raises:
            InferenceError: ONNX Runtime refuses the graph.
            DeviceError: it opened the graph elsewhere than it was asked to.
            NativeOpsError: it refuses the library, or the library this ONNX Runtime.
            InvalidArgumentError: it has no such session option.
            OutOfMemoryError: the weights do not fit.
        """
        self.path, self.settings = path, settings or Settings()
        self._session: Any = self._open()
        leave_to_parent(self._session)
        self.provider: str = self._session.get_providers()[0]
        if self.provider != (wanted := self.settings.placement.providers[0][0]):
            raise DeviceError(f"ONNX Runtime was to open '{path}' on {wanted} and opened it on {self.provider}. scm-runtime doctor shows what is missing.")
        outputs = [output.name for output in self._session.get_outputs()]
        if len(outputs) != 1:
            raise InferenceError(f"'{path}' must have one output, got {', '.join(outputs)}. Export the checkpoint again.")
        self.output: str = outputs[0]
        self.shapes: dict[str, tuple[int | str | None, ...]] = {value.name: tuple(value.shape) for value in self._session.get_inputs()}
        """Of each input; a name or None for a free dimension."""

    def __call__(self, **inputs: NDArray[Any]) -> NDArray[Any]:
        """Run the graph on arrays named as its inputs and return its only output.

        Raises:
            OutOfMemoryError: memory did not suffice.
            InferenceError: ONNX Runtime failed in the graph.
            GeneratorClosedError: the run was terminated.
        """
        options = _run_options(UNCAPTURED)
        with self.settings.runs.run(options) as run:
            try:
                result: NDArray[Any] = self._session.run([self.output], inputs, options)[0]
            except Exception as error:
                raise run_error(self.path, error, run) from error
        return result

    def bind(self, inputs: Mapping[str, Region], output: Region, *, run_options: Mapping[str, str] | None = None) -> Bound:
        """The graph with its tensors at fixed addresses of the session's device."""
        return Bound(self, inputs, output, run_options or {})

    def end_profiling(self) -> None:
        """Write the profile, where one was asked for."""
        if self.settings.profile_dir is not None:
            self._session.end_profiling()

    def _open(self) -> Any:
        """The session, out of the cache where that can be."""
        settings, cached = self.settings, self.settings.cached
        if cached is None or settings.frugal or settings.profile_dir is not None or not is_cacheable(settings.session_options):
            return self._open_at(self.path, _unchanged)
        providers = [(name, {key: value for key, value in options.items() if key not in VOLATILE_OPTIONS}) for name, options in settings.placement.providers]
        key = graph_key(
            graph=cached.sums[self.path.name],
            weights=cached.sums[WEIGHTS],
            providers=providers,
            device=settings.placement.hardware,
            library=cached.library if settings.library else None,
            session_options=settings.session_options,
        )
        return cached.cache.open(self.path, key, self._open_at, sums=cached.sums)

    def _open_at(self, path: Path, change: Callable[[Any], None]) -> Any:
        """The graph at a path, the session's own or a copy of it, with options that ``change`` has had the last word on."""
        ort, settings = load_onnxruntime(), self.settings
        options = ort.SessionOptions()
        configure(options, settings, self.path.stem)
        change(options)
        if settings.library is not None:
            try:
                options.register_custom_ops_library(os.fspath(settings.library))
            except Exception as error:
                raise NativeOpsError(
                    f"ONNX Runtime {ort.__version__} cannot use the library of native kernels '{settings.library}': {error}. "
                    "Install an ONNX Runtime and an scm-runtime that fit, or run without the kernels: native_ops=False"
                ) from error
        with settings.runs.run():  # which the end of the process waits for
            try:
                return self._open_with(path, options)
            except Exception as error:
                if _out_of_memory(error):
                    raise OutOfMemoryError(f"the memory of {settings.placement.device} does not suffice to open '{path}': {error}") from error
                remedy = "Upgrade it, or export the checkpoint again" + (", or run without the native kernels: native_ops=False" if settings.library else ".")
                raise InferenceError(f"ONNX Runtime {ort.__version__} cannot open '{path}': {error}. {remedy}") from error

    def _open_with(self, path: Path, options: Any) -> Any:
        """Open the graph, with its weights from memory where ONNX Runtime will not follow the link that the hub's cache has for them.

        ONNX Runtime reads external data in the folder of the graph alone, so that a hostile graph cannot read other files. It makes an exception for
        the cache of huggingface_hub: 1.24.1 does not, 1.24.2 to 1.31 do where the weights lie in the folder of the file that the graph is a
        link to, which huggingface_hub 2 has given up for large files, and 1.32 does always. Our own way costs the size of the weights in memory.
        """

        def attempt() -> Any:
            return load_onnxruntime().InferenceSession(
                os.fspath(path),
                options,
                providers=list(self.settings.placement.providers),
                disabled_optimizers=list(COPYING_OPTIMIZERS) if self.settings.frugal else [],
                enable_fallback=0,  # to other providers, with a line on the host's stdout
            )

        try:
            return attempt()
        except Exception:
            weights = hub.blob(path.with_name(WEIGHTS))
            if weights is None:
                raise
            self._weights = np.memmap(weights, np.uint8, "r")  # kept: ONNX Runtime reads it as it opens the graph, and holds on to the options
            options.add_external_initializers_from_files_in_memory([WEIGHTS], [self._weights], [len(self._weights)])
            return attempt()


def _unchanged(_options: Any) -> None:
    """Open as it stands."""


class Bound:
    """A session whose inputs and output lie at fixed addresses: each call runs it on what stands there."""

    def __init__(self, session: Session, inputs: Mapping[str, Region], output: Region, run_options: Mapping[str, str]) -> None:
        index = session.settings.placement.index
        if index is None:
            raise InvalidArgumentError(f"tensors are bound to the memory of a CUDA device, and the session is on {session.settings.placement.device}")
        self._path, self._session, self._runs = session.path, session._session, session.settings.runs
        self._binding = self._session.io_binding()
        for name, region in inputs.items():
            self._binding.bind_input(name, "cuda", index, region.dtype, region.shape, region.address)
        self._binding.bind_output(session.output, "cuda", index, output.dtype, output.shape, output.address)
        self._run_options = dict(run_options)

    def __call__(self) -> None:
        """Run. Raises OutOfMemoryError, InferenceError and GeneratorClosedError."""
        options = _run_options(self._run_options)
        with self._runs.run(options) as run:
            try:
                self._session.run_with_iobinding(self._binding, options)
            except Exception as error:
                raise run_error(self._path, error, run) from error


def _run_options(entries: Mapping[str, str]) -> Any:
    """New ones: to terminate a run is to set a flag in its options."""
    options = load_onnxruntime().RunOptions()
    for name, value in entries.items():
        options.add_run_config_entry(name, value)
    return options


def run_error(path: Path, error: Exception, run: Run) -> ScmError:
    """What went wrong while a graph ran."""
    if run.terminated:
        return closed_error()
    if _out_of_memory(error):
        return OutOfMemoryError(f"'{path.name}' failed: out of memory. Try a smaller batch. ({error})")
    return InferenceError(f"'{path.name}' failed: {error}.")


def _out_of_memory(error: Exception) -> bool:
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(words in said for words in OUT_OF_MEMORY)


def check_threads(threads: int | None) -> int | None:
    """A thread count as given, once it is known to be a positive integer or None."""
    if threads is None or (isinstance(threads, int | np.integer) and not isinstance(threads, bool) and 1 <= threads <= MOST_THREADS):
        return None if threads is None else int(threads)
    raise InvalidArgumentError(f"threads must be an integer from 1 to {MOST_THREADS}, or None for one a core, got {threads!r}")
