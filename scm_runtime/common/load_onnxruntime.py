"""The only place that imports ONNX Runtime, which ruff checks (``banned-api`` in pyproject.toml): all other modules call ``load_onnxruntime``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from scm_runtime.errors import MissingDependencyError

NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"


@cache
def load_onnxruntime() -> Any:
    """Import ONNX Runtime with its telemetry off, and return the module.

    Raises:
        MissingDependencyError: it is not installed, or both of its wheels are: they overwrite each other's files.
    """
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        raise MissingDependencyError(
            "both onnxruntime and onnxruntime-gpu are installed; they overwrite each other. Keep one:\n"
            "  pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'scm-runtime[cpu]'   (or [gpu])"
        )
    try:
        with _without_telemetry():
            import onnxruntime  # noqa: TID251  # the one import that the rule is for
    except ImportError as error:
        if _was_interrupted(error):
            raise KeyboardInterrupt from error
        raise MissingDependencyError(
            f"ONNX Runtime cannot be imported ({error}). Install it:\n  pip install 'scm-runtime[cpu]'   (or [gpu] for CUDA)"
        ) from error
    return onnxruntime


def _installed(distribution: str) -> bool:
    from importlib import metadata  # takes 20 ms, a third of importing scm_runtime

    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Within the block ONNX Runtime is told to report nothing to its makers, unless the environment says something about that itself.

    Since 1.29 it does so on Linux and macOS too, from the moment of its import, with an identifier kept on disk and a thread for which a forked
    child that exits waits for ever. It looks at the environment once.
    """
    if NO_TELEMETRY in os.environ:
        yield
        return
    os.environ[NO_TELEMETRY] = "1"
    try:
        yield
    finally:
        os.environ.pop(NO_TELEMETRY, None)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error came of Ctrl-C: an extension module that is interrupted while it is initialised raises ImportError from KeyboardInterrupt."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
