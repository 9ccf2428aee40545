"""What names a cached graph: all that decides how ONNX Runtime's optimised graph looks."""

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

FORMAT = 1  # of cache entries

# Of /proc/cpuinfo, on x86 and ARM.
CPU_LINES = ("model name", "vendor_id", "cpu family", "model\t", "flags", "features", "cpu implementer", "cpu part")

# Options that say what becomes of the optimised graph themselves, or that make ONNX Runtime read or write another format.
FOREIGN_OPTIONS = (
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
    """The name of a cached graph: SHA-256 over all that decides how the optimised graph looks, in hexadecimal.

    The running ONNX Runtime's version, the format of the cache and, as ONNX Runtime lays weights out for the vector units it finds, the CPU are in it too.

    Args:
        graph: SHA-256 of the ``.onnx`` file. Where nobody compared the file with its sum, ``checksums.stat_fingerprint`` of it instead: else a damaged file
            would leave its graph under the name of the good one.
        weights: of the weights beside it, likewise.
        providers: with their options, in order.
        device: the name of the accelerator, such as "NVIDIA L4 8.9"; "" for none.
        library: SHA-256 of the library of kernels; None where the function bodies run. A graph that was saved with kernels needs them ever after.
        session_options: all that were set beyond the defaults.
        disabled_optimizers: by name.
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
        "session_options": sorted((name, repr(value)) for name, value in (session_options or {}).items()),
        "disabled_optimizers": sorted(disabled_optimizers),
    }
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def is_cacheable(session_options: Mapping[str, object]) -> bool:
    """Whether sessions with these options can come out of the cache."""
    return not any(name.startswith(FOREIGN_OPTIONS) for name in session_options)


@cache
def _cpu() -> str:
    """The processor and its vector units, as the system tells them."""
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
            pass  # no /proc: the machine's name must do
    if sys.platform == "darwin":
        libc, size = ctypes.CDLL(None), ctypes.c_size_t(256)
        name = ctypes.create_string_buffer(size.value)
        if libc.sysctlbyname(b"machdep.cpu.brand_string", name, ctypes.byref(size), None, 0) == 0:
            known.append(name.value.decode("utf-8", "replace"))
    if sys.platform == "win32":
        known.append(os.environ.get("PROCESSOR_IDENTIFIER", ""))
        known += [str(bool(ctypes.windll.kernel32.IsProcessorFeaturePresent(feature))) for feature in (38, 39, 40, 41)]  # SSE4.2, AVX, AVX2, AVX-512F
    return "\n".join(known)
