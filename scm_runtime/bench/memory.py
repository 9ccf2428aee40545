"""How much memory the process has taken, and how much of a GPU's is taken: asked of the system and of NVIDIA's driver, with no package but Python's own."""

from __future__ import annotations

import ctypes
import sys
import uuid
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
NVML = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"


def resident_bytes() -> int | None:
    """What the process has in memory now; None where the system is not Linux."""
    return _status("VmRSS")


def peak_bytes() -> int | None:
    """The most it ever had; None where the system does not say."""
    if (most := _status("VmHWM")) is not None:
        return most
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _status(name: str) -> int | None:
    try:
        lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))  # nvmlMemory_t


class DeviceMemory:
    """A GPU's memory, by NVML, which comes with the driver. It counts what all processes take."""

    def __init__(self, index: int | None) -> None:
        """Find the device by CUDA's number, and see what is taken now; None for no device. Where that fails, ``growth`` is None for ever."""
        self.growth: int | None = None
        """By how much more was taken since, at most, whenever somebody looked."""
        self._nvml: Any = None
        self._device = ctypes.c_void_p()
        if index is not None:
            self._find(index)
        self._before = self._used()

    def look(self) -> None:
        """See what is taken now."""
        used = self._used()
        if used is not None and self._before is not None:
            self.growth = max(used - self._before, self.growth or 0)

    def _find(self, index: int) -> None:
        try:
            nvml = load_nvml()
            identity = _identity(index)
            if nvml.nvmlInit_v2() == 0 and any(
                nvml.nvmlDeviceGetHandleByUUID(f"{kind}-{identity}".encode(), ctypes.byref(self._device)) == 0 for kind in ("GPU", "MIG")
            ):
                self._nvml = nvml
        except (OSError, AttributeError):  # no driver, or one without these functions
            return

    def _used(self) -> int | None:
        memory = _Memory()
        if self._nvml is None or self._nvml.nvmlDeviceGetMemoryInfo(self._device, ctypes.byref(memory)) != 0:
            return None
        return int(memory.used)


def load_nvml() -> Any:
    """NVIDIA's management library. Raises OSError."""
    return ctypes.CDLL(NVML)


def _identity(index: int) -> uuid.UUID:
    """Of a device by CUDA's numbering, which CUDA_VISIBLE_DEVICES changes and NVML's does not. Raises OSError."""
    from scm_runtime.devices.cuda_driver import load_library

    cuda, handle, identity = load_library(), ctypes.c_int(), ctypes.create_string_buffer(16)
    for code in (cuda.cuInit(0), cuda.cuDeviceGet(ctypes.byref(handle), index), cuda.cuDeviceGetUuid_v2(identity, handle)):
        if code != 0:
            raise OSError(f"the driver does not tell which device cuda:{index} is ({code})")
    return uuid.UUID(bytes=identity.raw)
