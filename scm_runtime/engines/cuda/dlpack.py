"""Results in device memory that other libraries import through DLPack without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np

from scm_runtime.engines.cuda.handles import DeviceBuffer
from scm_runtime.engines.cuda.stream import CudaStream
from scm_runtime.engines.cuda.stream_argument import LEGACY_STREAM

KDLCUDA = 2  # the device type kDLCUDA of DLPack


class DeviceArray:
    """A result in device memory, for ``from_dlpack`` of torch, JAX, CuPy and others. It stays valid after the Generator is closed."""

    def __init__(self, stream: CudaStream, buffer: DeviceBuffer, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._stream, self._buffer, self.shape, self.dtype = stream, buffer, shape, dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype} {list(self.shape)}, cuda:{self._stream.index})"

    def __dlpack_device__(self) -> tuple[int, int]:
        return (KDLCUDA, self._stream.index)

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """Return a DLPack capsule. Later work on the consumer's stream waits, on the device, until the contents are complete.

        Args:
            stream: the consumer's stream as the array API numbers it: None or 1 is the legacy default stream, 2 the per-thread default stream, another
                positive number a handle; -1 means that the consumer synchronizes itself.
            max_version: the newest version of DLPack that the consumer supports.
            dl_device: this array's device, or None.
            copy: False or None.

        Raises:
            BufferError: another device or a copy was requested, or ``stream`` is 0, which the array API disallows as ambiguous.
        """
        if copy:
            raise BufferError("cannot copy while exporting: copy the result instead")
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"cannot export to the DLPack device {tuple(dl_device)}: the array is on {self.__dlpack_device__()}")
        if stream == 0 or (stream is not None and stream < -1):
            raise BufferError(f"stream must be None, -1, 1, 2 or the handle of a stream, got {stream}")
        if stream != -1 and self._buffer.ready_event is not None:
            self._stream.stream_wait_event(stream or LEGACY_STREAM, self._buffer.ready_event)
        return self._stream.export_dlpack(self._buffer, self.shape, self.dtype, max_version)
