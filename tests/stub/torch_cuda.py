"""As much of torch.cuda as tests/gpu use, on the stub's driver, for a build of torch without CUDA."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack

from stub.recording import driver, new_stream

KDLCUDA = 2
BYTES_BEFORE_TENSOR = 32  # of a DLManagedTensorVersioned: version, manager_ctx, deleter, flags


class Stream:
    """A stream of its own, like ``torch.cuda.Stream``."""

    def __init__(self, device: str = "cuda:0") -> None:
        self.cuda_stream = new_stream(torch.device(device).index or 0)


class DefaultStream:
    """The legacy default stream."""

    cuda_stream = 0


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )


class Tensor:
    """A tensor on the stub's device, imported through DLPack. Its memory is the host's, in fact."""

    def __init__(self, source: Any) -> None:
        kind, index = source.__dlpack_device__()
        self._capsule = source.__dlpack__(stream=_streams[-1].cuda_stream or 1, max_version=(1, 0))
        tensor = _DLTensor.from_address(_pointer(self._capsule))
        assert (kind, index) == (tensor.device_type, tensor.device_id)
        assert kind == KDLCUDA
        self.device = torch.device("cuda", index)
        shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
        dtype = np.dtype(f"{'iuf'[tensor.code]}{tensor.bits // 8}")
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
        assert not tensor.strides or [tensor.strides[i] for i in range(tensor.ndim)] == strides, "not contiguous"
        memory = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(tensor.data + tensor.offset)
        self._array = np.frombuffer(memoryview(memory), dtype).reshape(shape)

    def cpu(self) -> torch.Tensor:
        """Return a copy."""
        return torch.from_numpy(self._array.copy())


def install() -> None:
    """Replace the functions of torch that tests/gpu call."""
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: int(_counted()),
        "mem_get_info": _memory,
        "Stream": Stream,
        "default_stream": DefaultStream,
        "stream": _current,
    }
    for name, replacement in replaced.items():
        setattr(torch.cuda, name, replacement)
    setattr(torch.utils.dlpack, "from_dlpack", Tensor)  # noqa: B010  # another type than the function's


_streams: list[Any] = [DefaultStream]


@contextmanager
def _current(stream: Any) -> Iterator[None]:
    _streams.append(stream)
    try:
        yield
    finally:
        _streams.pop()


def _counted() -> int:
    count = ctypes.c_int()
    driver().cuDeviceGetCount(ctypes.byref(count))
    return count.value


def _memory(device: object = None) -> tuple[int, int]:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    driver().cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def _pointer(capsule: Any) -> int:
    get_name, get_pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    name = get_name(capsule)
    return int(get_pointer(capsule, name)) + (BYTES_BEFORE_TENSOR if name == b"dltensor_versioned" else 0)
