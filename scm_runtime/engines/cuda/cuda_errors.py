"""Errors of CUDA as errors of this package."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from scm_runtime.errors import InferenceError, InvalidArgumentError, MissingDependencyError, OutOfMemoryError

P = ParamSpec("P")
Result = TypeVar("Result")

# Parts of the messages of CUDA and ONNX Runtime, in lower case, after which the device's context is unusable until the process restarts.
_FATAL_MESSAGES = (
    *("illegal memory access", "illegal_address", "illegal instruction", "illegal_instruction", "device-side assert", "cuda_error_assert"),
    *("unspecified launch failure", "launch_failed", "misaligned address", "misaligned_address", "uncorrectable ecc", "ecc_uncorrectable"),
)


class PinnedMemoryError(OutOfMemoryError):
    """The host has no more page-locked memory. Freeing memory of the device does not help."""


def is_fatal(error: BaseException) -> bool:
    """Return True if a CUDA error makes the device's context unusable in this process."""
    message = str(error).lower()
    return any(words in message for words in _FATAL_MESSAGES)


def check(returned: tuple[Any, ...]) -> Any:
    """Return the result of a driver call without its status. Raises InferenceError or OutOfMemoryError if the call failed."""
    if status := returned[0]:
        if "OUT_OF_MEMORY" in status.name:
            raise OutOfMemoryError(f"the device is out of memory: {status.name}")
        raise InferenceError(f"CUDA failed: {status.name}")
    return returned[1] if len(returned) > 1 else None


def translate_errors(function: Callable[P, Result]) -> Callable[P, Result]:
    """Decorate a function so that CUDA's exceptions become InferenceError or OutOfMemoryError."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except (InferenceError, InvalidArgumentError, MissingDependencyError, MemoryError):  # MemoryError: of the host
            raise
        except Exception as error:
            if "out_of_memory" in str(error).lower().replace(" ", "_"):
                raise OutOfMemoryError(f"the device is out of memory: {error}") from error
            raise InferenceError(f"CUDA failed: {error}") from error

    return call
