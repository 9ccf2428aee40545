"""Results that stay in the device's memory, for other libraries to take over without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np

from scm_runtime.engines.cuda.stream import LEGACY_STREAM, CudaStream, DeviceBuffer

KDLCUDA = 2  # DLPack's number of the device type


class DeviceArray:
    """A result in the device's memory, for ``from_dlpack`` of torch, JAX, CuPy and others. It lives as long as somebody holds it, without the Generator too."""

    def __init__(self, stream: CudaStream, memory: DeviceBuffer, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._stream, self._memory, self.shape, self.dtype = stream, memory, shape, dtype

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
        """A capsule. What the consumer does next on ``stream`` waits, on the device, until the contents are there.

        Args:
            stream: the consumer's, by the array API: None or 1 the legacy default stream, 2 the per-thread default, -1 none: the consumer waits itself.
            max_version: of DLPack.
            dl_device: this array's device, or None.
            copy: False or None.

        Raises:
            BufferError: another device or a copy is asked for, or the stream is 0, which the array API leaves out as ambiguous.
        """
        if copy:
            raise BufferError("cannot copy while exporting: copy the result")
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"cannot export to the DLPack device {tuple(dl_device)}: the array is on {self.__dlpack_device__()}")
        if stream == 0 or (stream is not None and stream < -1):
            raise BufferError(f"stream must be None, -1, 1, 2 or a handle, got {stream}")
        if stream != -1:
            self._stream.stream_wait_event(stream or LEGACY_STREAM, self._memory.ready_event)
        return self._stream.export_dlpack(self._memory, self.shape, self.dtype, max_version)
