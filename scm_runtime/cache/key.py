"""Keys of cached graphs: a hash over everything that determines how ONNX Runtime optimizes a graph."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import msgspec

from scm_runtime.common.load_onnxruntime import load_onnxruntime

FORMAT = 1  # version of the cache's entries

# Lines of /proc/cpuinfo that identify a processor, on x86 and ARM.
CPU_LINES = ("model name", "vendor_id", "cpu family", "model\t", "flags", "features", "cpu implementer", "cpu part")

# Prefixes of options that save the optimized graph themselves, or that make ONNX Runtime read or write another format.
UNCACHEABLE_OPTIONS = (
    "optimized_model_filepath",
    "enable_profiling",
    "ep.context_",
    "session.optimized_model_",
    "session.load_model_format",
    "session.save_",
    "session.use_ort_model_",
)


def graph_key(
    *,
    graph: str,
    weights: str,
    providers: Sequence[tuple[str, Mapping[str, str]]],
    device: str = "",
    library: str | None = None,
    session_options: Mapping[str, object] | None = None,
    disabled_optimizers: Sequence[str] = (),
) -> str:
    """Return the key of a cached graph: a SHA-256 in hexadecimal over everything that determines the optimized graph.

    It also covers the version of ONNX Runtime, the format of the cache and the CPU: ONNX Runtime arranges weights for the vector units that it finds.

    Args:
        graph: SHA-256 of the ``.onnx`` file. If the file was not verified, its ``checksums.stat_fingerprint`` instead: otherwise the graph of a damaged
            file would be cached under the key of the intact one.
        weights: the same for the weights file.
        providers: execution providers with their options, in order.
        device: name of the accelerator, such as "NVIDIA L4 8.9"; empty if there is none.
        library: SHA-256 of the native library, or None if the function bodies run. A graph that was saved with native kernels needs them to be opened.
        session_options: the session options that were set.
        disabled_optimizers: names of graph optimizers that were disabled.
    """
    parts = {
        "format": FORMAT,
        "onnxruntime": load_onnxruntime().__version__,
        "graph": graph,
        "weights": weights,
        "providers": [[name, sorted((option, str(value)) for option, value in options.items())] for name, options in providers],
        "device": device,
        "cpu": _cpu() if any(name == "CPUExecutionProvider" for name, _ in providers) else "",
        "library": library,
        "max_isa": os.environ.get("SCM_OPS_MAX_ISA", "") if library else "",  # whether there are kernels for some operators depends on it
        "session_options": sorted((name, repr(value)) for name, value in (session_options or {}).items()),
        "disabled_optimizers": sorted(disabled_optimizers),
    }
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def is_cacheable(session_options: Mapping[str, object]) -> bool:
    """Return True if a graph opened with these session options can be cached."""
    return not any(name.startswith(UNCACHEABLE_OPTIONS) for name in session_options)


@cache
def _cpu() -> str:
    """Return the processor's model and vector units, as the system reports them."""
    known = [platform.machine()]  # not platform.processor(), which starts a process
    if sys.platform == "linux":
        try:
            with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    if not line.strip():
                        break  # the other cores are the same
                    if line.lower().startswith(CPU_LINES):
                        known.append(line.strip())
        except OSError:
            pass  # no /proc: only the architecture is known
    if sys.platform == "darwin":
        libc, size = ctypes.CDLL(None), ctypes.c_size_t(256)
        name = ctypes.create_string_buffer(size.value)
        if libc.sysctlbyname(b"machdep.cpu.brand_string", name, ctypes.byref(size), None, 0) == 0:
            known.append(name.value.decode("utf-8", "replace"))
    if sys.platform == "win32":
        known.append(os.environ.get("PROCESSOR_IDENTIFIER", ""))
        known += [str(bool(ctypes.windll.kernel32.IsProcessorFeaturePresent(feature))) for feature in (38, 39, 40, 41)]  # SSE4.2, AVX, AVX2, AVX-512F
    return "\n".join(known)
