"""The only module that imports ONNX Runtime. All others call ``load_onnxruntime``; ruff checks this (``banned-api`` in pyproject.toml)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from scm_runtime.common.installed import install_extras, installed_version
from scm_runtime.common.interrupts import was_interrupted
from scm_runtime.common.memory import MORE_MEMORY, NOEXEC, memory_errors, unmapped_library
from scm_runtime.errors import MissingDependencyError

NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"


@cache
def load_onnxruntime() -> Any:
    """Import ONNX Runtime with its telemetry off, and return the module.

    Raises:
        MissingDependencyError: it is not installed, or both onnxruntime and onnxruntime-gpu are, which overwrite each other's files.
        OutOfMemoryError: there is not enough memory to load it.
    """
    if installed_version("onnxruntime") and installed_version("onnxruntime-gpu"):
        raise MissingDependencyError(
            "both onnxruntime and onnxruntime-gpu are installed; they overwrite each other. Keep one:\n"
            f"  pip uninstall -y onnxruntime onnxruntime-gpu && {install_extras('cpu')}\n  or for CUDA: {install_extras('gpu')}"
        )
    try:
        with memory_errors("ONNX Runtime", MORE_MEMORY), _without_telemetry():
            import onnxruntime  # noqa: TID251  # the one import that the rule is for
    except ImportError as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from error
        if (library := unmapped_library(error)) is not None:
            raise MissingDependencyError(f"ONNX Runtime is installed, but the system does not run code from '{library}': {NOEXEC}") from error
        raise MissingDependencyError(
            f"ONNX Runtime cannot be imported ({error}). Install it:\n  {install_extras('cpu')}\n  or for CUDA: {install_extras('gpu')}"
        ) from error
    return onnxruntime


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Turn ONNX Runtime's telemetry off for an import in this block, unless ORT_DISABLE_TELEMETRY is already set.

    Since 1.29 ONNX Runtime sends telemetry on Linux and macOS too, starting with its import. It keeps an identifier on disk and starts a thread for which
    a forked child waits forever when it exits. ONNX Runtime reads the environment variable once.
    """
    if NO_TELEMETRY in os.environ:
        yield
        return
    os.environ[NO_TELEMETRY] = "1"
    try:
        yield
    finally:
        os.environ.pop(NO_TELEMETRY, None)
