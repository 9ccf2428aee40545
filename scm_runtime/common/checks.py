"""Checks of single values that come from a caller."""

from __future__ import annotations

import numpy as np


def is_int(value: object) -> bool:
    """Whether a value is an integer of Python or NumPy; truth values are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool | np.bool_)
