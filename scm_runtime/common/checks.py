"""Checks of single values that come from a caller."""

from __future__ import annotations

import numpy as np


def is_int(value: object) -> bool:
    """Return True for an integer of Python or NumPy, but not for a truth value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool | np.bool_)
