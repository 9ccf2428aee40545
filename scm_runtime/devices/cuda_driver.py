"""NVIDIA's driver, asked through ctypes: its version and its devices. No context is made, and nothing is taken of a device's memory."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from typing import Any

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # of CUdevice_attribute
NO_DEVICE = 100

# What to do about errors of cuInit, by CUresult; names and texts come from the driver.
REMEDIES = {
    3: "This process was forked from one that used CUDA: start it by spawn.",
    34: "A stub of the CUDA toolkit was found in place of the driver: take its folder of stubs out of LD_LIBRARY_PATH.",
    802: "Start the fabric manager: systemctl start nvidia-fabricmanager",
    803: "The driver's library and the kernel's module have different versions: restart the machine, or the container with the host's library.",
    804: "Take the package cuda-compat out of LD_LIBRARY_PATH: it is for data-centre GPUs.",
    999: "Check that nvidia-smi works and that the module nvidia_uvm is loaded (modprobe nvidia_uvm); restart the machine after a driver's upgrade.",
}


@dataclass(frozen=True)
class Device:
    """One GPU, by CUDA's numbering, which CUDA_VISIBLE_DEVICES changes."""

    index: int
    name: str
    compute_capability: str
    """"8.9"."""
    memory_bytes: int


@dataclass(frozen=True)
class Driver:
    """What the driver says."""

    version: int | None
    """The newest CUDA it runs, 13020 for 13.2; None where there is no driver."""
    devices: tuple[Device, ...] = ()
    error: str | None = None
    """Why there are no devices, and what to do."""


def load_library() -> Any:
    """The driver's library. Raises OSError."""
    return ctypes.CDLL(LIBRARY)


def read_driver() -> Driver:
    """Ask the driver. It never raises: what is wrong is ``error``."""
    try:
        cuda = load_library()
    except OSError as error:
        return Driver(
            None,
            error=f"there is no NVIDIA driver ({error}). Install NVIDIA's driver; in a container, start it with the GPUs: docker run --gpus all",
        )
    number = ctypes.c_int()
    version = number.value if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0 else None
    try:
        _check(cuda, "cuInit", cuda.cuInit(0))
        _check(cuda, "cuDeviceGetCount", cuda.cuDeviceGetCount(ctypes.byref(number)))
        return Driver(version, tuple(_read_device(cuda, index) for index in range(number.value)))
    except OSError as error:
        return Driver(version, error=str(error))


def _read_device(cuda: Any, index: int) -> Device:
    handle, major, minor, memory, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    _check(cuda, "cuDeviceGet", cuda.cuDeviceGet(ctypes.byref(handle), index))
    _check(cuda, "cuDeviceGetName", cuda.cuDeviceGetName(name, len(name), handle))
    _check(cuda, "cuDeviceTotalMem", cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle))
    for number, attribute in ((major, COMPUTE_CAPABILITY_MAJOR), (minor, COMPUTE_CAPABILITY_MINOR)):
        _check(cuda, "cuDeviceGetAttribute", cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, handle))
    return Device(index, name.value.decode(errors="replace"), f"{major.value}.{minor.value}", memory.value)


def _check(cuda: Any, function: str, code: int) -> None:
    """Raises OSError for a CUresult other than success."""
    if code == 0:
        return
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    cuda.cuGetErrorName(code, ctypes.byref(name))
    cuda.cuGetErrorString(code, ctypes.byref(text))
    said = f"{(name.value or b'an unknown error').decode()} ({code}): {(text.value or b'no text').decode()}"
    remedy = REMEDIES.get(code, "Check that nvidia-smi works.")
    if code == NO_DEVICE:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        remedy = "Check that nvidia-smi lists a GPU" + ("." if visible is None else f", and CUDA_VISIBLE_DEVICES, which is {visible!r}.")
    raise OSError(f"the NVIDIA driver is there, but {function} fails with {said}. {remedy}")
