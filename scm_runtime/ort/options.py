"""ONNX Runtime's options of a session: what a good guest sets, and over it what the host asked for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from scm_runtime.errors import InvalidArgumentError
from scm_runtime.ort.native_ops import MATMUL_PRECISION, check_precision

if TYPE_CHECKING:
    from scm_runtime.ort.session import Settings

# Within a run a thread that has no work looks out for it this long, in microseconds, before it sleeps: to wake one after every operator costs a small model
# a sixth of its time. Where other programs have the cores, to look out longer costs more than it gains (benchmarks/NOTES.md). Between runs none does.
CPU_ENTRIES = {"session.intra_op.allow_spinning": "1", "session.intra_op.spin_duration_us": "20", "session.force_spinning_stop": "1"}
CUDA_ENTRIES = {"session.intra_op.allow_spinning": "0"}
FRUGAL_ENTRIES = {"session.disable_prepacking": "1"}


def configure(options: Any, settings: Settings, profile_name: str) -> None:
    """Set ONNX Runtime's fresh ``SessionOptions``; profiles are written under this name in the settings' folder.

    Raises:
        InvalidArgumentError: the settings' ``session_options`` has a name or a value that ONNX Runtime does not.
    """
    options.log_severity_level = 4  # what goes wrong is raised, not printed
    on_cpu = settings.placement.device == "cpu"
    if on_cpu:
        # A pattern's block comes beside what the arena holds already: half as much memory again where batch sizes vary (benchmarks/NOTES.md, entry 17).
        options.enable_mem_pattern = False
    entries: dict[str, object] = dict(CPU_ENTRIES if on_cpu else CUDA_ENTRIES)
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    if settings.frugal:
        options.enable_cpu_mem_arena = False
        entries |= FRUGAL_ENTRIES
    if settings.profile_dir is not None:
        options.enable_profiling = True
        options.profile_file_prefix = os.fspath(settings.profile_dir / profile_name)
    for name, value in settings.session_options.items():
        if "." in name:
            entries[name] = value
        else:
            _set_attribute(options, name, value)
    entries[MATMUL_PRECISION] = check_precision(entries.get(MATMUL_PRECISION, "high"))
    if settings.library is None or not on_cpu or settings.frugal:  # the last: what is not folded would be packed at every run
        del entries[MATMUL_PRECISION]
    for name, value in entries.items():  # each once: ONNX Runtime prints a line where it is told twice
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
