"""What a callback between two steps returns."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from scm_runtime.errors import GenerationCancelledError, InvalidArgumentError


def returned_state(returned: object, x: NDArray[np.float32], step: int) -> NDArray[np.float32] | None:
    """Return the state with which a callback replaces ``x``, or None if it keeps ``x``.

    Args:
        returned: what the callback returned.
        x: the state that it was given.
        step: number of the step, from 1.

    Raises:
        GenerationCancelledError: it returned False.
        InvalidArgumentError: it returned something that is not a state.
    """
    if returned is None:
        return None
    if returned is False:
        raise GenerationCancelledError(f"callback_on_step_end returned False after step {step}: the call ended there")
    if not isinstance(returned, Mapping):
        raise InvalidArgumentError(f"callback_on_step_end must return None, False to stop, or a dict with 'latents', got {type(returned).__name__}")
    if unknown := sorted(map(str, returned.keys() - {"latents"})):
        raise InvalidArgumentError(f"callback_on_step_end may return 'latents', got {', '.join(map(repr, unknown))}")
    if "latents" not in returned:
        return None
    latents = returned["latents"]
    try:
        if np.iscomplexobj(latents):
            raise TypeError("complex numbers")
        changed = np.array(latents, np.float32, order="C")
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"callback_on_step_end must return latents that are an array of numbers, got {type(latents).__name__}") from error
    if changed.shape != x.shape:
        raise InvalidArgumentError(f"callback_on_step_end must return latents of the shape {list(x.shape)}, got {list(changed.shape)}")
    if not np.isfinite(changed).all():
        raise InvalidArgumentError("callback_on_step_end must return finite latents, got NaN or infinity")
    return changed
