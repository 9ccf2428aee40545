"""``DynamicSplits``: chunk and split along a dimension of unknown size, as networks with classifier-free guidance split a doubled batch.

torch's tracer fixes the batch size at these functions, because it computes the number of parts from the size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode

FUNCTIONS = {"chunk", "split"}
MAX_PARTS = 16


class DynamicSplits(TorchFunctionMode):
    """Context manager in which a tensor whose traced size is known to be a multiple of a part's size is split by slicing."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        parts = _split(name, *args, **kwargs) if name in FUNCTIONS and args else None
        return func(*args, **kwargs) if parts is None else parts


def _split(name: str, tensor: Tensor, number: Any = None, dim: int = 0, **named_number: Any) -> tuple[Tensor, ...] | None:
    """Return the parts as slices; None if the size is a constant or is not known to be a multiple of the size of a part.

    ``number`` is a number of parts or, for split, the size of one. As a keyword it has a different name in each function.
    """
    number, size = next(iter(named_number.values()), number), tensor.shape[dim]
    if isinstance(size, int) or not isinstance(number, int | torch.SymInt):
        return None
    if name == "split":
        part, count = number, next((count for count in range(1, MAX_PARTS + 1) if statically_known_true(count * number == size)), 0)
    else:
        part, count = size // number, number if statically_known_true(size // number * number == size) else 0
    return tuple(tensor.narrow(dim, i * part, part) for i in range(count)) or None
