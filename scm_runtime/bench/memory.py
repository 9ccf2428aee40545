"""Memory use of the process and of a GPU, from the operating system and NVIDIA's driver. Uses only the standard library."""

from __future__ import annotations

import ctypes
import sys
import uuid
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
NVML = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"


def resident_bytes() -> int | None:
    """Resident memory of the process; None on systems other than Linux."""
    return _status("VmRSS")


def peak_bytes() -> int | None:
    """Highest resident memory of the process so far; None if the system does not report it."""
    if (peak := _status("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def _status(name: str) -> int | None:
    try:
        lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))  # nvmlMemory_t


class DeviceMemory:
    """Growth of a GPU's used memory, from NVML, which is part of the driver. It includes the memory of all processes."""

    def __init__(self, index: int | None) -> None:
        """Find a device by CUDA's index (None: no device), and read its used memory. If that fails, ``growth`` stays None."""
        self.growth: int | None = None
        """Largest growth of used memory, in bytes, at any call of ``update``."""
        self._nvml: Any = None
        self._device = ctypes.c_void_p()
        if index is not None:
            self._find(index)
        self._before = self._used()

    def update(self) -> None:
        """Read the used memory and update ``growth``."""
        used = self._used()
        if used is not None and self._before is not None:
            self.growth = max(used - self._before, self.growth or 0)

    def _find(self, index: int) -> None:
        try:
            nvml = load_nvml()
            device = _uuid(index)
            if nvml.nvmlInit_v2() == 0 and any(
                nvml.nvmlDeviceGetHandleByUUID(f"{kind}-{device}".encode(), ctypes.byref(self._device)) == 0 for kind in ("GPU", "MIG")
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
    """Load NVIDIA's management library. Raises OSError."""
    return ctypes.CDLL(NVML)


def _uuid(index: int) -> uuid.UUID:
    """UUID of the device with CUDA's index, which CUDA_VISIBLE_DEVICES changes; NVML's index is not affected. Raises OSError."""
    from scm_runtime.devices.cuda_driver import load_library

    cuda, handle, buffer = load_library(), ctypes.c_int(), ctypes.create_string_buffer(16)
    for code in (cuda.cuInit(0), cuda.cuDeviceGet(ctypes.byref(handle), index), cuda.cuDeviceGetUuid_v2(buffer, handle)):
        if code != 0:
            raise OSError(f"the driver did not return the UUID of cuda:{index} ({code})")
    return uuid.UUID(bytes=buffer.raw)
