"""Checks the pickle in a file of ``torch.save`` before torch reads it.

torch's ``weights_only`` loader runs no code from a file, but it calls functions that can take any time and memory: ``bytearray(2**40)``,
``_codecs.encode`` with the quadratic encoding punycode, ``torch.Tensor(10**10)``. It allocates storages and tensors as large as the file claims.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from scm_export.checkpoints.archive import check_archive
from scm_export.checkpoints.inert_pickle import (
    MAX_INTEGER_BITS,
    Bounded,
    ForbiddenPickleError,
    Global,
    Interpreter,
    MalformedPickleError,
    StandIn,
)
from scm_export.checkpoints.stored_tensors import MAX_DIMENSIONS, STORAGE_DTYPES
from scm_runtime.common.documents import check_depth
from scm_runtime.common.files import open_regular
from scm_runtime.common.message_text import printable

MAX_SMALL = 1 << 20  # bytes of an entry that is neither the pickle nor a storage, such as the version
MAX_HASHED = 64  # levels of tuples: hashing a deeply nested tuple overflows the C stack
MAX_EXPANDED = 1 << 24  # elements of a tensor that is larger than its storage, such as a broadcast one

# Of the functions that torch's loader calls, those that a pickle of dense tensors needs, or whose results ``without_attributes`` refuses by name.
REBUILT = ("parameter", "parameter_with_state", "tensor", "tensor_v2", "tensor_v3", "qtensor", "sparse_tensor", "nested_tensor", "meta_tensor_no_storage")
NEEDED = {f"torch._utils._rebuild_{name}" for name in REBUILT}
UNNEEDED = re.compile(r"torch\.(_utils\._rebuild_\w+|(\w+\.)*\w*(Tensor|Storage))")

ITEM_SIZES = {name: dtype.itemsize for name, dtype in STORAGE_DTYPES.items()}
ITEM_SIZES |= {"torch.storage.UntypedStorage": 1, "torch.ComplexFloatStorage": 8, "torch.ComplexDoubleStorage": 16}
ITEM_SIZES |= {"torch.QInt8Storage": 1, "torch.QUInt8Storage": 1, "torch.QInt32Storage": 4, "torch.QUInt4x2Storage": 1, "torch.QUInt2x4Storage": 1}


class UnboundedCallError(MalformedPickleError):
    """The pickle calls a function that can take any time and memory. The message names it."""


def check_zip_pickle(source: Path) -> None:
    """Check the pickle of a torch.save archive. torch maps the file and would read past the end of a storage that is shorter than the pickle claims.

    Raises:
        OversizedPickleError: it has too many opcodes, or its calls copy too much.
        UnboundedCallError: it calls a function that no state_dict needs.
        MalformedPickleError: it is damaged, or a storage is missing or shorter than its tensors.
    """
    entries = {entry.filename.partition("/")[2]: entry for entry in check_archive(source)}
    if "data.pkl" not in entries:
        return
    for name, other in entries.items():
        if name != "data.pkl" and not name.startswith("data/") and other.file_size > MAX_SMALL:
            raise MalformedPickleError(f"the entry '{printable(name)}' must have at most {MAX_SMALL} bytes, got {other.file_size}")
    entry = entries["data.pkl"]
    del entry.CRC  # keeps zipfile from comparing it: check_contents already has, and some files have no checksums
    with zipfile.ZipFile(source) as archive:
        pickle = io.BytesIO(archive.read(entry))
    with suppress(ForbiddenPickleError):  # torch refuses it at the same opcode, and names what it wants to call
        scan = _Scan({name.removeprefix("data/"): entry.file_size for name, entry in entries.items() if name.startswith("data/")})
        scan.read(pickle)


def check_legacy_pickles(source: Path) -> None:
    """Check a file in torch.save's format before it became a zip archive: five pickles, then the storages, one after the other.

    Raises the errors of :func:`check_zip_pickle`.
    """
    size = source.stat().st_size
    with suppress(ForbiddenPickleError), open_regular(source) as file:
        scan = _Scan()
        for _ in range(5):
            scan.read(Bounded(file, size))
        if (required := sum(scan.required.values())) > size - file.tell():
            raise MalformedPickleError(_disagree(required, max(size - file.tell(), 0)))


class _Scan:
    """Follows the opcodes of a pickle. Of its objects, only plain values, tuples and the sizes of storages and lists are kept."""

    def __init__(self, stored: Mapping[str, int] | None = None) -> None:
        """``stored`` has the size of each storage in bytes, by key; None if they are not known in advance."""
        self.stored = stored
        self.required: dict[str, int] = {}
        """Size of each storage in bytes that the pickle claims, by key."""

    def read(self, pickle: BinaryIO | Bounded) -> None:
        _Scanner(pickle, _AnyGlobal(), None, self._storage).run()

    def _storage(self, persistent_id: Any) -> object:
        match persistent_id:
            case ("storage", Global(name=kind), str(key), _, int(count), *_) if kind in ITEM_SIZES and count >= 0:
                required = count * ITEM_SIZES[kind]
                self.required[key] = max(self.required.get(key, 0), required)
                if self.stored is not None and required > (stored := self.stored.get(key, 0)):
                    raise MalformedPickleError(_disagree(required, stored))
                return _Storage(required, ITEM_SIZES[kind])
            case ("storage", *_):
                raise MalformedPickleError("a storage must be described by its type, key, location and number of elements")
        return PLACEHOLDER  # torch refuses it


@dataclass(frozen=True)
class _Storage:
    nbytes: int
    itemsize: int


class _Scanner(Interpreter):
    """An interpreter that accepts any key, since it uses none: torch checks them."""

    def key(self, value: Any) -> Hashable:
        _check_hashable(value)
        return value if isinstance(value, str | float | int) else id(value)


class _Placeholder(dict[Any, Any]):
    """Replaces every object that is not needed. It stays empty."""

    def __setitem__(self, key: object, value: object) -> None:
        """Discard the item."""

    def build(self, state: object) -> None:
        """Check the state, of which torch makes attributes."""
        _check_hashable(state)


class _Tensor:
    """Replaces a tensor. It has no state: torch would make it a view of any storage."""

    def build(self, state: object) -> None:
        raise UnboundedCallError("it sets the state of a tensor")


PLACEHOLDER, TENSOR = _Placeholder(), _Tensor()


class _AnyGlobal(Mapping[str, StandIn]):
    """Maps every global to a function that checks its arguments. torch refuses the globals that it does not know."""

    def __getitem__(self, name: str) -> StandIn:
        return StandIn(call=partial(_call, name), new=partial(_call, name))

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _call(name: str, *arguments: object) -> object:
    match name, arguments:
        case "builtins.set" | "__builtin__.set" | "collections.Counter" | "collections.OrderedDict", _:
            _check_hashable(arguments)
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_qtensor", (storage, offset, shape, stride, *_):
            _check_tensor(storage, offset, shape, stride)
        case "torch._utils._rebuild_tensor_v3", (storage, offset, shape, stride, _, _, dtype, *_):
            _check_tensor(storage, offset, shape, stride, _item_size(dtype))
        case "torch._tensor._rebuild_from_type_v2", (Global(name=function), _, tuple(inner), *_):
            _call(function, *inner)
        case "_codecs.encode", (_, "latin1" | "latin-1"):
            pass
        case "_codecs.encode", _:
            raise UnboundedCallError("it encodes bytes as something other than latin1 text")
        case "builtins.bytearray" | "__builtin__.bytearray", (int(), *_) | (str(), *_) if arguments[1:] not in (("latin1",), ("latin-1",)):
            raise UnboundedCallError("it makes a bytearray of a given size or encoding")
        case _ if name not in NEEDED and UNNEEDED.fullmatch(name):
            raise UnboundedCallError(f"it calls {name}")
    return TENSOR if name in NEEDED else PLACEHOLDER


def _check_hashable(value: object) -> None:
    if isinstance(value, dict | list | tuple):
        check_depth(value, MAX_HASHED, MAX_INTEGER_BITS)


def _item_size(dtype: object) -> int:
    found = getattr(torch, dtype.name.removeprefix("torch."), None) if isinstance(dtype, Global) else None
    if not isinstance(found, torch.dtype):
        raise MalformedPickleError("a tensor must have a dtype")
    return found.itemsize


def _check_tensor(storage: object, offset: object, shape: object, stride: object, itemsize: int | None = None) -> None:
    """Check that a tensor is within its storage."""
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise MalformedPickleError("a tensor must be made of a storage, an offset, a shape and strides")
    if len(shape) > MAX_DIMENSIONS:
        raise MalformedPickleError(f"a tensor must have at most {MAX_DIMENSIONS} dimensions, got {len(shape)}")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (offset, *shape, *stride)):
        raise MalformedPickleError("a tensor must have integers of at least 0 as offset, sizes and strides")
    assert isinstance(offset, int)
    stored, elements = storage.nbytes // (itemsize or storage.itemsize), math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if elements and last >= stored:
        raise MalformedPickleError(
            f"shape and storage of a tensor disagree: shape {list(shape)!s:.200}, strides {list(stride)!s:.200} from element {offset} on, "
            f"in a storage of {stored} elements"
        )
    if elements > max(stored, MAX_EXPANDED):
        raise MalformedPickleError(
            f"a tensor that is larger than its storage, such as an expanded one, must have at most {MAX_EXPANDED} elements, got shape {list(shape)!s:.200} "
            f"in a storage of {stored}; call .contiguous() on it before saving"
        )


def _disagree(required: int, stored: int) -> str:
    return f"shape and storage of a tensor disagree, {required} bytes required, {stored} stored"
