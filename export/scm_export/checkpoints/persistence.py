"""Reads the pickles of NVIDIA's EDM2 and of its descendants: class names, constructor arguments and tensors. Nothing from the file is run.

Such a file is a plain pickle in which every network object is the record ``torch_utils.persistence._reconstruct_persistent_obj(meta)``. The usual
loader executes the Python source in ``meta``; here it is not looked at. What a class computes is known by its name (``edm2_pickles.py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scm_export.checkpoints.inert_pickle import Blob, ForbiddenPickleError, MalformedPickleError, StandIn, read_pickle
from scm_export.checkpoints.stored_tensors import TENSOR_STAND_INS, StoredTensor
from scm_export.errors import CheckpointError

MAX_NAME = 300


@dataclass
class Saved:
    """A network, a layer or another object as the file describes it."""

    class_name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    """What the constructor was called with, as ``args`` is."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Its other attributes, which may have changed since."""
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    """Its own parameters and buffers."""
    modules: dict[str, Saved] = field(default_factory=dict)

    def build(self, state: object) -> None:
        """Take an object's ``__dict__``, laid out as torch's modules do. Raises MalformedPickleError."""
        if not isinstance(state, dict):
            raise MalformedPickleError(f"the state of a {self.class_name} must be a dict, got {type(state).__name__}")
        self.args = tuple(_part(state, "_init_args", (list, tuple)))
        self.kwargs = _part(state, "_init_kwargs", (dict,))
        self.attributes = {name: value for name, value in state.items() if isinstance(name, str) and not name.startswith("_")}
        tensors = {**_part(state, "_parameters", (dict,)), **_part(state, "_buffers", (dict,))}
        modules = _part(state, "_modules", (dict,))
        self.tensors = {_name(name): value for name, value in tensors.items() if _holds(value, StoredTensor)}
        self.modules = {_name(name): value for name, value in modules.items() if _holds(value, Saved)}

    def named_modules(self) -> Iterator[tuple[str, Saved]]:
        """This object, with the name "", and every module in it by its dotted name. Raises MalformedPickleError where one is held twice."""
        waiting, seen = [("", self)], set[int]()
        while waiting:
            name, module = waiting.pop()
            if id(module) in seen or len(name) > MAX_NAME:
                raise MalformedPickleError(f"the module {name[:MAX_NAME]!r} is held twice, or too deep in others")
            seen.add(id(module))
            yield name, module
            waiting += reversed([(f"{name}.{child}" if name else child, part) for child, part in module.modules.items()])

    def named_tensors(self) -> dict[str, StoredTensor]:
        """All parameters and buffers in it by their dotted names, as in a state_dict.

        Raises:
            MalformedPickleError: a module is held twice, or tensors overlap, which in memory would be larger than in the file without end.
        """
        named = {f"{name}.{own}" if name else own: tensor for name, module in self.named_modules() for own, tensor in module.tensors.items()}
        in_file = [tensor for tensor in named.values() if isinstance(tensor.data, Blob)]
        if sum(tensor.nbytes for tensor in in_file) > sum(data.size for data in {tensor.data for tensor in in_file} if isinstance(data, Blob)):
            raise MalformedPickleError("its tensors overlap in their storages")
        return named


def read_persistent(path: str | os.PathLike[str]) -> object:
    """What an EDM2-style pickle holds: containers and plain values, with :class:`Saved` for networks. Its tensors stay in the file until loaded.

    Raises:
        CheckpointError: the file wants more than data, which is named; or it is damaged.
    """
    source = Path(path)
    with pickle_errors(source):
        return read_pickle(source, STAND_INS)


@contextmanager
def pickle_errors(source: Path) -> Iterator[None]:
    """Turns what reading a pickle raises into a CheckpointError that names the file."""
    try:
        yield
    except ForbiddenPickleError as error:
        raise CheckpointError(
            f"'{source}' is a pickle that wants to run code ({error}), and was not loaded: it must hold tensors and plain values only."
        ) from error
    except (MalformedPickleError, OSError) as error:
        raise CheckpointError(f"'{source}' is not a readable {source.suffix or 'pickle'} file: {error}. Copy or save it again.") from error


# ----------------------------------------------------------------------------
# What the globals of such files are replaced by.


def _record(meta: object) -> Saved:
    """``_reconstruct_persistent_obj``: the record of an object. Its ``module_src`` is not looked at."""
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
        raise MalformedPickleError("a persistent object must be recorded as a dict with type = 'class', a class_name and a state")
    saved = Saved(meta["class_name"])
    saved.build(meta.get("state"))
    return saved


def _empty() -> dict[Any, Any]:
    """``OrderedDict``: its items follow."""
    return {}


def _names(items: object = ()) -> set[str]:
    """``set``: torch's modules keep names of buffers in one."""
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise MalformedPickleError("a set must hold names")
    return set(items)


def _part(state: dict[Any, Any], name: str, kinds: tuple[type, ...]) -> Any:
    """A part of an object's state, empty where there is none."""
    value = state.get(name)
    if value is None:
        return kinds[0]()
    if not isinstance(value, kinds):
        raise MalformedPickleError(f"{name} must be a {kinds[0].__name__}, got {type(value).__name__}")
    return value


def _name(name: object) -> str:
    if not isinstance(name, str) or len(name) > MAX_NAME:
        raise MalformedPickleError(f"tensors and modules must have names of at most {MAX_NAME} characters")
    return name


def _holds(value: object, kind: type) -> bool:
    """Whether there is one: a module without a bias holds None."""
    if value is not None and not isinstance(value, kind):
        raise MalformedPickleError(f"a module must hold tensors and modules, got {type(value).__name__} for a {kind.__name__}")
    return value is not None


STAND_INS: dict[str, StandIn] = {
    **TENSOR_STAND_INS,
    "torch_utils.persistence._reconstruct_persistent_obj": StandIn(call=_record),
    "dnnlib.util.EasyDict": StandIn(new=dict),
    "collections.OrderedDict": StandIn(call=_empty),
    "torch.nn.modules.container.ModuleDict": StandIn(new=lambda: Saved("ModuleDict")),
    "torch.nn.modules.linear.Linear": StandIn(new=lambda: Saved("Linear")),
    **{f"{builtins}.set": StandIn(call=_names) for builtins in ("builtins", "__builtin__")},
}
