"""How a graph is opened: the settings of this package, and the ``SessionOptions`` of ONNX Runtime that follow from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from scm_runtime.cache.graph_cache import GraphCache
from scm_runtime.common.checks import is_int
from scm_runtime.common.runs import RunRegistry
from scm_runtime.devices.placement import CPU, Placement
from scm_runtime.errors import InvalidArgumentError

MAX_THREADS = 1024  # every graph has a thread pool

# During a run, a thread without work spins for 20 microseconds before it sleeps: waking a thread after every operator costs a small model a sixth of its time.
# On a busy machine, spinning longer costs more than it saves (benchmarks/NOTES.md). Between runs no thread spins.
CPU_ENTRIES = {"session.intra_op.allow_spinning": "1", "session.intra_op.spin_duration_us": "20", "session.force_spinning_stop": "1"}
CUDA_ENTRIES = {"session.intra_op.allow_spinning": "0"}
LOW_MEMORY_ENTRIES = {"session.disable_prepacking": "1"}

RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"  # which provider runs each node

# A session configuration entry of the native library, with the values of torch.set_float32_matmul_precision. It sets how convolutions and matrix products over
# feature maps are computed on a CPU: "highest" leaves them to ONNX Runtime, "high" and "medium" select kernels by the processor (docs/custom-ops.md).
MATMUL_PRECISION = "scm.float32_matmul_precision"
PRECISIONS = ("highest", "high", "medium")

# A session configuration entry of the native library, for CUDA and graphs in float16 or bfloat16. It sets what computes the convolutions over channels-last
# maps, and the operations that follow them: "own" is the library, "cudnn" leaves them to ONNX Runtime.
CONVOLUTION = "scm.convolution"
Convolution = Literal["own", "cudnn"]


@dataclass(frozen=True)
class CacheContext:
    """A cache of optimized graphs, and the checksums that identify one bundle's graphs in it."""

    cache: GraphCache
    checksums: Mapping[str, str]
    """SHA-256 of the bundle's files by file name, or ``checksums.stat_fingerprint`` if the files were not verified."""
    library: str | None
    """SHA-256 of the native library; None if it is not used."""


@dataclass(frozen=True)
class SessionSettings:
    """How a graph is opened and run."""

    placement: Placement = CPU
    """Device and execution providers."""
    threads: int | None = None
    """Number of intra-op threads; None for ONNX Runtime's default, one per core."""
    library: Path | None = None
    """Custom-op library whose kernels replace the function bodies in the graph; None to run the function bodies."""
    cache: CacheContext | None = None
    """Cache of optimized graphs; None to optimize the graph each time it is opened."""
    convolution: Convolution = "cudnn"
    """Value of the entry ``CONVOLUTION``; the one in ``session_options`` overrides it."""
    session_options: Mapping[str, object] = field(default_factory=dict)
    """Attributes of ONNX Runtime's SessionOptions by name, and configuration entries, whose names contain a dot."""
    profile_dir: Path | None = None
    """Folder for ONNX Runtime's profile of each session, written when the session is closed."""
    low_memory: bool = False
    """Keep memory close to the size of the weights, at the cost of speed: weights are not packed, folded or reordered."""
    runs: RunRegistry = field(default_factory=RunRegistry, compare=False, repr=False)
    """Registry of the session's runs in flight. Sessions that are terminated together share one."""


def check_threads(threads: object) -> int | None:
    """Return a thread count as an int, or None. Raises InvalidArgumentError if it is not None or an integer from 1 to ``MAX_THREADS``."""
    if threads is None:
        return None
    if is_int(threads) and 1 <= cast(int, threads) <= MAX_THREADS:
        return int(cast(int, threads))
    raise InvalidArgumentError(f"threads must be an integer from 1 to {MAX_THREADS}, or None for one per core, got {threads!r}")


def check_precision(precision: object) -> str:
    """Return a value of the entry ``MATMUL_PRECISION`` unchanged. Raises InvalidArgumentError if it is not one of ``PRECISIONS``."""
    if isinstance(precision, str) and precision in PRECISIONS:
        return precision
    raise InvalidArgumentError(f"session_options: {MATMUL_PRECISION} must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def check_convolution(convolution: object) -> Convolution:
    """Return a value of the entry ``CONVOLUTION`` unchanged. Raises InvalidArgumentError if it is not "own" or "cudnn"."""
    if convolution in ("own", "cudnn"):
        return convolution
    raise InvalidArgumentError(f"session_options: {CONVOLUTION} must be own or cudnn, got {convolution!r}")


def configure(options: Any, settings: SessionSettings, profile_name: str) -> None:
    """Apply settings to a new ``onnxruntime.SessionOptions``.

    Args:
        options: the SessionOptions to change.
        settings: how the graph is opened.
        profile_name: prefix of the profile's file name.

    Raises:
        InvalidArgumentError: ``session_options`` has a name or value that ONNX Runtime does not know.
    """
    options.log_severity_level = 4  # errors are raised, not printed
    on_cpu = settings.placement.device == "cpu"
    if on_cpu:
        # The block of a memory pattern is allocated beside the arena: half as much memory again if batch sizes vary (benchmarks/NOTES.md, entry 17).
        options.enable_mem_pattern = False
    entries: dict[str, object] = {RECORD_PLACEMENT: "1", **(CPU_ENTRIES if on_cpu else CUDA_ENTRIES)}
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    if settings.low_memory:
        options.enable_cpu_mem_arena = False
        entries |= LOW_MEMORY_ENTRIES
    if settings.profile_dir is not None:
        options.enable_profiling = True
        options.profile_file_prefix = os.fspath(settings.profile_dir / profile_name)
    for name, value in settings.session_options.items():
        if "." in name:
            entries[name] = value
        else:
            _set_attribute(options, name, value)
    entries[MATMUL_PRECISION] = check_precision(entries.get(MATMUL_PRECISION, "high"))
    if settings.library is None or not on_cpu or settings.low_memory:  # without constant folding, weights would be packed in every run
        del entries[MATMUL_PRECISION]
    entries[CONVOLUTION] = check_convolution(entries.get(CONVOLUTION, settings.convolution))
    if settings.library is None or on_cpu:
        del entries[CONVOLUTION]
    for name, value in entries.items():  # each entry once: ONNX Runtime prints a line if an entry is set twice
        try:
            options.add_session_config_entry(name, str(value))
        except RuntimeError as error:
            raise InvalidArgumentError(f"session_options: {name[:60]!r} cannot be {str(value)[:60]!r}: {error}") from error


def _set_attribute(options: Any, name: str, value: object) -> None:
    if name.startswith("_") or callable(getattr(options, name, len)):
        known = ", ".join(known for known in dir(options) if not known.startswith("_") and not callable(getattr(options, known)))
        raise InvalidArgumentError(f"session_options must name attributes of ONNX Runtime's SessionOptions ({known}), or entries with a dot; got {name!r}")
    try:
        setattr(options, name, value)
    except TypeError as error:
        raise InvalidArgumentError(f"session_options: {name} cannot be {value!r}: {error}") from error
