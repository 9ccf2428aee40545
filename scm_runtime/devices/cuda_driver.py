"""Query NVIDIA's driver through ctypes: its version and its devices. This creates no CUDA context and allocates no device memory."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from typing import Any

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # of CUdevice_attribute
NO_DEVICE = 100

# Remedies for errors of cuInit, by CUresult. Names and descriptions of errors come from the driver.
REMEDIES = {
    3: "This process was forked from one that used CUDA: start it with spawn.",
    34: "The CUDA toolkit's stub was found instead of the driver: remove the stubs folder from LD_LIBRARY_PATH.",
    802: "Start the fabric manager: systemctl start nvidia-fabricmanager",
    803: "The driver's library and kernel module have different versions: restart the machine, or start the container with the host's library.",
    804: "Remove the package cuda-compat from LD_LIBRARY_PATH: it is for data-center GPUs.",
    999: "Check that nvidia-smi works and that the kernel module nvidia_uvm is loaded (modprobe nvidia_uvm). Restart the machine after a driver upgrade.",
}


@dataclass(frozen=True)
class Device:
    """One GPU."""

    index: int
    """CUDA's index, which CUDA_VISIBLE_DEVICES changes."""
    name: str
    compute_capability: str
    """For example "8.9"."""
    memory_bytes: int


@dataclass(frozen=True)
class Driver:
    """State of NVIDIA's driver."""

    version: int | None
    """Newest CUDA version that it supports, 13020 for 13.2; None if there is no driver."""
    devices: tuple[Device, ...] = ()
    error: str | None = None
    """Why there are no devices, and the remedy."""

    @property
    def cuda_version(self) -> str | None:
        """Newest CUDA version that it supports, as text: "13.2"; None if there is no driver."""
        return None if self.version is None else f"{self.version // 1000}.{self.version % 1000 // 10}"

    @property
    def cuda_major(self) -> int | None:
        """Major version of the newest CUDA that it supports; None if there is no driver."""
        return None if self.version is None else self.version // 1000


def load_library() -> Any:
    """Load the driver's library. Raises OSError."""
    return ctypes.CDLL(LIBRARY)


def read_driver() -> Driver:
    """Query the driver. Does not raise: failures are described by ``error``."""
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
    """Raise OSError for a CUresult other than success."""
    if code == 0:
        return
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    cuda.cuGetErrorName(code, ctypes.byref(name))
    cuda.cuGetErrorString(code, ctypes.byref(text))
    described = f"{(name.value or b'an unknown error').decode()} ({code}): {(text.value or b'no text').decode()}"
    remedy = REMEDIES.get(code, "Check that nvidia-smi works.")
    if code == NO_DEVICE:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        remedy = "Check that nvidia-smi lists a GPU" + ("." if visible is None else f", and check CUDA_VISIBLE_DEVICES, which is {visible!r}.")
    raise OSError(f"there is an NVIDIA driver, but {function} fails with {described}. {remedy}")
