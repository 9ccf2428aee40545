"""Empty placeholders for objects that a training run saves beside its tensors (arguments, NumPy values, paths), for torch's ``weights_only`` loader.

Only for :mod:`~scm_export.checkpoints.torch_file`. The contents of such objects are never used, so they are neither constructed nor kept.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from scm_runtime.common.message_text import printable


class IgnoredObject:
    """Placeholder for an object. It accepts any arguments and any state and discards them."""

    __slots__ = ()

    def __new__(cls, *arguments: object) -> IgnoredObject:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Discard the state. Without this method the loader would set attributes named by the file."""


def _empty_dict(*default_factory: object) -> dict[Any, Any]:
    """Replacement for ``defaultdict``, which would call its factory for a missing key. The loader adds the items afterwards."""
    return {}


PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
NUMPY = ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
IGNORED = (
    "argparse.Namespace",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in PATHS),  # the second in Python 3.13
    *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in NUMPY),  # NumPy 2 made its core private
    *("numpy.ndarray", "numpy.dtype", "builtins.bytes"),  # protocol 2 writes the bytes of an empty array as a call of builtins.bytes
    *(f"builtins.{name}" for name in ("list", "dict", "int", "float", "str")),  # factories of a defaultdict
)
STAND_INS = [("collections.defaultdict", _empty_dict), *((name, IgnoredObject) for name in IGNORED)]

_one_at_a_time = threading.Lock()  # torch's list of safe globals is shared by the whole process


@contextmanager
def ignoring_objects() -> Iterator[None]:
    """Within the block, ``torch.load(weights_only=True)`` accepts the objects in ``IGNORED`` and replaces them by placeholders."""
    with _one_at_a_time, torch.serialization.safe_globals([(stand_in, name) for name, stand_in in STAND_INS]):
        yield


def without_attributes(content: object) -> object:
    """Remove instance attributes from everything torch's loader returned, in place, and return the content.

    The loader lets a file set attributes of any name on dicts and tensors, and these hide the methods of the same name. Dicts lose their
    attributes here; tensors in dicts and lists are replaced by plain tensors over the same memory.

    Raises:
        ValueError: a tensor is sparse, nested, quantized or without data.
    """
    if isinstance(content, Tensor):
        return _plain(content, "")
    waiting: list[Any] = [content] if isinstance(content, dict | list | tuple) else []
    seen = {id(content)}
    while waiting:
        container = waiting.pop()
        if isinstance(container, OrderedDict | Counter):
            vars(container).clear()
        items: Any = dict.items(container) if isinstance(container, dict) else enumerate(container)
        for key, value in items:
            if isinstance(value, Tensor):
                plain = _plain(value, key)
                if not isinstance(container, tuple):
                    container[key] = plain  # the size of a dict does not change
            elif isinstance(value, dict | list | tuple) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)
    return content


def _plain(tensor: Tensor, key: object) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type != "cpu":
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else "without data" if tensor.is_meta else "sparse"
        raise ValueError(f"the tensor {printable(key)} must be dense, and is {kind}")
    return Tensor.detach(tensor)
