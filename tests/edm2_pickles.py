"""Writes pickles in the layout of NVIDIA's EDM2: an object's class name, its module's source code and its ``__dict__``. EDM2's loader executes the source.

The modules that such a pickle refers to do not exist here; they are created temporarily while it is written.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

SOURCE = "raise AssertionError('the source in the pickle was executed')\n"


class EasyDict(dict[str, Any]):
    """``dnnlib.util.EasyDict``, a dictionary whose items are also attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


EasyDict.__module__ = "dnnlib.util"


def _reconstruct_persistent_obj(meta: object) -> None:
    raise AssertionError("never called: only its name is written")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """Mixin for objects that record their constructor arguments, like ``persistent_class``."""

    recorded_as: str | None = None
    """Class name to write into the record; None for the actual name."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Persistent:
        self = super().__new__(cls)
        self.__dict__.update(_init_args=args, _init_kwargs=EasyDict(kwargs))
        return self


class Recorded(Persistent):
    """A recorded object with any class name and attributes."""

    def __init__(self, class_name: str, **attributes: object) -> None:
        self.__dict__.update(attributes, _init_args=(), _init_kwargs=EasyDict())
        self._class_name = class_name


def snapshot(network: nn.Module, **others: object) -> EasyDict:
    """Return the content of an EDM2 snapshot: the averaged network in half precision, and the data set, loss and encoder."""
    content: dict[str, object] = {
        "encoder": Recorded("StandardRGBEncoder"),
        "dataset_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset", path="data.zip", use_labels=True),
        "loss_fn": Recorded("EDM2Loss", P_mean=-0.4, P_std=1.0, sigma_data=0.5),
        "ema": network.eval().requires_grad_(False).half(),
        **others,
    }
    return EasyDict({name: value for name, value in content.items() if value is not None})


def write_pickle(content: object, path: Path, *, protocol: int = 4, source: str = SOURCE) -> Path:
    """Pickle ``content``, with every Persistent object as a record. Returns ``path``."""
    with path.open("wb") as file, _named_modules():
        _Pickler(file, protocol, source).dump(content)
    return path


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any, protocol: int, source: str) -> None:
        super().__init__(file, protocol)
        self.source = source

    def reducer_override(self, obj: object) -> tuple[Callable[..., object], tuple[object]]:
        if not isinstance(obj, Persistent):
            return NotImplemented  # type: ignore[no-any-return]  # means: use the default
        state = dict(obj.__dict__)
        meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": state.pop("_class_name", None) or obj.recorded_as or type(obj).__name__,
            "state": state,
        }
        return _reconstruct_persistent_obj, (meta,)


@contextmanager
def _named_modules() -> Iterator[None]:
    contents: dict[str, dict[str, object]] = {
        "dnnlib": {},
        "dnnlib.util": {"EasyDict": EasyDict},
        "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
    }
    assert not contents.keys() & sys.modules.keys()
    for name, content in contents.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(content)
    try:
        yield
    finally:
        for name in contents:
            del sys.modules[name]
