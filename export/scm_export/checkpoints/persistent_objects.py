"""Reads pickles of NVIDIA's EDM2 and of projects derived from it: class names, constructor arguments and tensors. No code from the file is run.

Such a file is a plain pickle in which every network object is the record ``torch_utils.persistence._reconstruct_persistent_obj(meta)``. EDM2's loader
executes the Python source in ``meta``; here it is ignored. A class is identified by its name (``edm2_pickles.py``).
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
from scm_runtime.common.message_text import first_line

MAX_NAME = 300


@dataclass
class PersistentObject:
    """A network, layer or other object as described in the file."""

    class_name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the constructor; ``args`` are the positional ones."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Public attributes at the time of saving; they may differ from the constructor's arguments."""
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    """Parameters and buffers of this module, without those of submodules."""
    modules: dict[str, PersistentObject] = field(default_factory=dict)

    def build(self, state: object) -> None:
        """Set the fields from an object's ``__dict__``, which has the layout of a torch module. Raises MalformedPickleError."""
        if not isinstance(state, dict):
            raise MalformedPickleError(f"the state of a {self.class_name} must be a dict, got {type(state).__name__}")
        self.args = tuple(_part(state, "_init_args", (list, tuple)))
        self.kwargs = _part(state, "_init_kwargs", (dict,))
        self.attributes = {name: value for name, value in state.items() if isinstance(name, str) and not name.startswith("_")}
        tensors = {**_part(state, "_parameters", (dict,)), **_part(state, "_buffers", (dict,))}
        modules = _part(state, "_modules", (dict,))
        self.tensors = {_name(name): value for name, value in tensors.items() if _holds(value, StoredTensor)}
        self.modules = {_name(name): value for name, value in modules.items() if _holds(value, PersistentObject)}

    def named_modules(self) -> Iterator[tuple[str, PersistentObject]]:
        """Yield this object, named "", and every submodule with its dotted name. Raises MalformedPickleError if one occurs twice."""
        waiting, seen = [("", self)], set[int]()
        while waiting:
            name, module = waiting.pop()
            if id(module) in seen or len(name) > MAX_NAME:
                raise MalformedPickleError(f"the module {name[:MAX_NAME]!r} occurs twice, or is nested too deeply")
            seen.add(id(module))
            yield name, module
            waiting += reversed([(f"{name}.{child}" if name else child, part) for child, part in module.modules.items()])

    def named_tensors(self) -> dict[str, StoredTensor]:
        """All parameters and buffers by their dotted names, as in a state_dict.

        Raises:
            MalformedPickleError: a module occurs twice, or tensors overlap: loaded, they could be arbitrarily larger than the file.
        """
        named = {f"{name}.{own}" if name else own: tensor for name, module in self.named_modules() for own, tensor in module.tensors.items()}
        in_file = [tensor for tensor in named.values() if isinstance(tensor.data, Blob)]
        if sum(tensor.nbytes for tensor in in_file) > sum(data.size for data in {tensor.data for tensor in in_file} if isinstance(data, Blob)):
            raise MalformedPickleError("its tensors overlap in their storages")
        return named


def read_persistent(path: str | os.PathLike[str]) -> object:
    """Read an EDM2-style pickle: containers and plain values, with :class:`PersistentObject` for networks. Tensors stay in the file until loaded.

    Raises:
        CheckpointError: the file is damaged, or needs more than data; the message then names what it needs.
    """
    source = Path(path)
    with pickle_errors(source):
        return read_pickle(source, STAND_INS)


@contextmanager
def pickle_errors(source: Path) -> Iterator[None]:
    """Within the block, convert errors of reading a pickle into a CheckpointError that names the file."""
    try:
        yield
    except ForbiddenPickleError as error:
        raise CheckpointError(
            f"'{source}' is a pickle that wants to run code ({error}), and was not loaded: it must hold tensors and plain values only."
        ) from error
    except (MalformedPickleError, OSError) as error:
        raise CheckpointError(f"'{source}' is not a readable {source.suffix or 'pickle'} file: {first_line(error)}. Copy or save it again.") from error


# ----------------------------------------------------------------------------
# Stand-ins for the globals of such files.


def _record(meta: object) -> PersistentObject:
    """Stand-in for ``_reconstruct_persistent_obj``, the record of an object. Its source, ``module_src``, is ignored."""
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("class_name"), str) or len(meta["class_name"]) > MAX_NAME:
        raise MalformedPickleError("a persistent object must be recorded as a dict with type = 'class', a class_name and a state")
    saved = PersistentObject(meta["class_name"])
    saved.build(meta.get("state"))
    return saved


def _empty() -> dict[Any, Any]:
    """Stand-in for ``OrderedDict``. The pickle adds the items afterwards."""
    return {}


def _names(items: object = ()) -> set[str]:
    """Stand-in for ``set``, in which torch modules keep names of buffers."""
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise MalformedPickleError("a set must hold names")
    return set(items)


def _part(state: dict[Any, Any], name: str, kinds: tuple[type, ...]) -> Any:
    """Return one entry of an object's state, or an empty container if it is missing."""
    value = state.get(name)
    if value is None:
        return kinds[0]()
    if not isinstance(value, kinds):
        raise MalformedPickleError(f"{name} must be a {kinds[0].__name__}, got {type(value).__name__}")
    return value


def _name(name: object) -> str:
    if not isinstance(name, str) or len(name) > MAX_NAME or not name.isprintable():
        raise MalformedPickleError(f"tensors and modules must have names of at most {MAX_NAME} printable characters")
    return name


def _holds(value: object, kind: type) -> bool:
    """Check the type of a module's entry and return False for None, as for the bias of a module without one."""
    if value is not None and not isinstance(value, kind):
        raise MalformedPickleError(f"a module must hold tensors and modules, got {type(value).__name__} for a {kind.__name__}")
    return value is not None


STAND_INS: dict[str, StandIn] = {
    **TENSOR_STAND_INS,
    "torch_utils.persistence._reconstruct_persistent_obj": StandIn(call=_record),
    "dnnlib.util.EasyDict": StandIn(new=_empty),
    "collections.OrderedDict": StandIn(call=_empty),
    "torch.nn.modules.container.ModuleDict": StandIn(new=lambda: PersistentObject("ModuleDict")),
    "torch.nn.modules.linear.Linear": StandIn(new=lambda: PersistentObject("Linear")),
    **{f"{builtins}.set": StandIn(call=_names) for builtins in ("builtins", "__builtin__")},
}
