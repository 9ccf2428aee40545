"""Tensors and NumPy arrays as ``pickle.dump`` writes them: checked, and left in the file until they are loaded. Not for torch.save archives."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scm_export.checkpoints.inert_pickle import Blob, Global, MalformedPickleError, StandIn, read_small_pickle

MAX_ELEMENTS = 1 << 48
MAX_DIMENSIONS = 64  # as in torch and NumPy
STORAGE_HEADER = 4096  #  bytes; a storage's own pickles take some 250
SHORT_TEXT = 64  #  characters; longer text is encoded when its bytes are used
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  #  first pickle of torch.save's format before it became a zip archive

STORAGE_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
NUMPY_DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "b1": torch.bool,
}

Bytes = Blob | bytes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in the file. ``offset`` and ``stride`` are in elements of its storage, ``data``."""

    dtype: torch.dtype
    data: Bytes
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_sizes((self.offset,), self.shape, self.stride)
        if len(self.shape) != len(self.stride):
            raise MalformedPickleError(f"a tensor must have one stride per dimension, got {list(self.shape)} and {list(self.stride)}")
        elements = size_of(self.data) // self.dtype.itemsize
        if self.numel and max(self.last + 1, self.numel) > elements:
            raise MalformedPickleError(
                f"a tensor's shape and storage disagree: shape {list(self.shape)}, strides {list(self.stride)} from element {self.offset} on, "
                f"in a storage of {elements} elements"
            )

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def last(self) -> int:
        """Index of the tensor's last element in the storage."""
        return self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))

    def load(self) -> Tensor:
        """Read the tensor into new, contiguous memory. Raises MalformedPickleError or OSError if the file has changed."""
        if not self.numel:
            return torch.empty(self.shape, dtype=self.dtype)
        start, end = self.offset * self.dtype.itemsize, (self.last + 1) * self.dtype.itemsize
        data = self.data.read(start, end - start) if isinstance(self.data, Blob) else bytearray(self.data[start:end])
        return torch.frombuffer(data, dtype=self.dtype).as_strided(self.shape, self.stride).contiguous()


def size_of(data: Bytes) -> int:
    """Size in bytes."""
    return data.size if isinstance(data, Blob) else len(data)


def as_floats(value: object) -> tuple[float, ...] | None:
    """Convert a list, tuple or NumPy array of at most 1024 numbers; return None for anything else."""
    if isinstance(value, _NumpyArray):
        value = value.value
    if isinstance(value, StoredTensor) and len(value.shape) == 1 and value.numel <= 1024:
        value = value.load().tolist()
    if isinstance(value, list | tuple) and len(value) <= 1024 and all(isinstance(number, int | float) for number in value):
        return tuple(map(float, value))
    return None


# ----------------------------------------------------------------------------
# torch: a tensor is a view of a storage, which is saved as a small file in torch's format.


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    data: Bytes


def _storage(blob: object) -> _Storage:
    """Stand-in for ``torch.storage._load_from_bytes``: torch.save's old format, five pickles followed by the elements.

    The pickles are read as strictly as the file itself.
    """
    if not isinstance(blob, Blob | bytes):
        raise MalformedPickleError(f"a storage must be made of bytes, got {type(blob).__name__}")
    head = blob.read(0, min(blob.size, STORAGE_HEADER)) if isinstance(blob, Blob) else blob
    if head.startswith(b"PK"):
        raise MalformedPickleError("a storage must be in torch's uncompressed format, got a zip archive")
    file = io.BytesIO(head)
    magic, _, _ = (read_small_pickle(file, {}) for _ in range(3))
    described = read_small_pickle(file, STORAGE_STAND_INS, _persistent_storage)
    read_small_pickle(file, {})
    if magic != TORCH_MAGIC or not isinstance(described, _StorageHeader):
        raise MalformedPickleError("a storage must be in torch's format, got another pickle")
    size, start = described.numel * described.dtype.itemsize, file.tell() + 8
    if int.from_bytes(file.read(8), "little") != described.numel or start + size != size_of(blob):
        raise MalformedPickleError(f"a storage declares {described.numel} elements, {size} bytes, and has {max(0, size_of(blob) - start)}")
    data = Blob(blob.source, blob.start + start, size) if isinstance(blob, Blob) else blob[start:]
    return _Storage(described.dtype, data)


@dataclass(frozen=True)
class _StorageHeader:
    dtype: torch.dtype
    numel: int


def _persistent_storage(key: object) -> _StorageHeader:
    match key:
        case ("storage", Global(name=name), str(), str(), int() as numel, None) if 0 <= numel < MAX_ELEMENTS:  # type, key, location, size, view
            return _StorageHeader(STORAGE_DTYPES[name], numel)
    raise MalformedPickleError("a storage must be described by its type, key, location and number of elements")


def _tensor(
    storage: object, offset: object, shape: object, stride: object, requires_grad: object = False, hooks: object = None, metadata: object = None
) -> StoredTensor:
    """Stand-in for ``torch._utils._rebuild_tensor_v2``."""
    if not isinstance(storage, _Storage) or not isinstance(offset, int) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise MalformedPickleError("a tensor must be made of a storage, an offset, a shape and strides")
    return StoredTensor(storage.dtype, storage.data, offset, shape, stride)


def _parameter(data: object, requires_grad: object = False, hooks: object = None) -> object:
    """Stand-in for ``torch._utils._rebuild_parameter``."""
    return data


# ----------------------------------------------------------------------------
# NumPy: EDM2 stores the statistics of its latents as arrays.


@dataclass
class _NumpyDtype:
    name: str

    def build(self, state: object) -> None:
        """Check the state, ``(version, byte order, ...)``."""
        if not (isinstance(state, tuple) and state[1:2] and state[1] in ("<", "|", "=")):
            raise MalformedPickleError("NumPy arrays must be little-endian")


@dataclass
class _NumpyArray:
    value: StoredTensor | None = None

    def build(self, state: object) -> None:
        """Set the array from the state, ``(version, shape, dtype, Fortran order, data)``."""
        match state:
            case (_, shape, kind, False, data):
                self.value = _dense(kind, shape, data)
            case _:
                raise MalformedPickleError("the state of a NumPy array must be its shape, dtype, C order and bytes")


def _numpy_dtype(name: object, align: object = False, copy: object = True) -> _NumpyDtype:
    if name not in NUMPY_DTYPES:
        raise MalformedPickleError(f"NumPy arrays must be of one of {', '.join(NUMPY_DTYPES)}")
    return _NumpyDtype(str(name))


def _numpy_array(cls: object, shape: object, kind: object) -> _NumpyArray:
    """Stand-in for ``numpy.core.multiarray._reconstruct``: an empty array, whose state follows in the pickle."""
    return _NumpyArray()


def _numpy_from_buffer(data: object, kind: object, shape: object, order: object) -> _NumpyArray:
    """Stand-in for ``numpy.core.numeric._frombuffer``, which pickle protocol 5 uses for arrays."""
    if order != "C":
        raise MalformedPickleError("NumPy arrays must be in C order")
    return _NumpyArray(_dense(kind, shape, data))


def _numpy_scalar(kind: object, data: object) -> float:
    value: float = _dense(kind, (), data).load().item()
    return value


def _dense(kind: object, shape: object, data: object) -> StoredTensor:
    if not (isinstance(kind, _NumpyDtype) and isinstance(shape, tuple) and isinstance(data, Blob | bytes)):
        raise MalformedPickleError("a NumPy array must be made of bytes, a dtype and a shape")
    _check_sizes(shape)
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return StoredTensor(NUMPY_DTYPES[kind.name], data, 0, shape, stride)


def _latin_text(text: object, encoding: object) -> Bytes:
    """Stand-in for ``_codecs.encode``, with which protocol 2 writes bytes, since it has no opcode for them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise MalformedPickleError("bytes must be written as latin1 text")
    return text.encode("latin-1") if len(text) <= SHORT_TEXT else Blob(text, 0, len(text))


def _check_sizes(*sizes: tuple[object, ...]) -> None:
    """Check that sizes, strides and offsets are small enough for computations with them. Raises MalformedPickleError."""
    for numbers in sizes:
        if len(numbers) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < MAX_ELEMENTS for n in numbers):
            raise MalformedPickleError(f"a tensor must have at most {MAX_DIMENSIONS} dimensions, and integers of at least 0 as sizes and strides")


STORAGE_STAND_INS = {name: StandIn() for name in STORAGE_DTYPES}

TENSOR_STAND_INS: dict[str, StandIn] = {
    "torch._utils._rebuild_tensor_v2": StandIn(call=_tensor),
    "torch._utils._rebuild_parameter": StandIn(call=_parameter),
    "torch.storage._load_from_bytes": StandIn(call=_storage),
    "_codecs.encode": StandIn(call=_latin_text),
    "numpy.ndarray": StandIn(),
    "numpy.dtype": StandIn(call=_numpy_dtype),
    # NumPy 2 made its core private.
    **{f"numpy.{core}.multiarray._reconstruct": StandIn(call=_numpy_array) for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": StandIn(call=_numpy_scalar) for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": StandIn(call=_numpy_from_buffer) for core in ("core", "_core")},
}
