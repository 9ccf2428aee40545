"""The argument ``stream``: the caller's stream in any of the forms that libraries use."""

from __future__ import annotations

from scm_runtime.errors import InvalidArgumentError

# CUDA's predefined handles: the default stream shared by all threads, and the default stream of the calling thread.
LEGACY_STREAM, PER_THREAD_STREAM = 1, 2


def parse_stream(stream: object) -> int:
    """Return the handle of a stream given by the caller.

    Args:
        stream: an integer handle, an object with ``__cuda_stream__``, or a ``torch.cuda.Stream``; 0 is the legacy default stream.

    Raises:
        InvalidArgumentError: it is none of these, or it is the per-thread default stream.
    """
    handle: object = stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        handle = (protocol() if callable(protocol) else protocol)[1]
    elif hasattr(stream, "cuda_stream"):
        handle = stream.cuda_stream
    if isinstance(handle, bool) or not isinstance(handle, int) or handle < 0:
        raise InvalidArgumentError(f"stream must be the handle of a CUDA stream or an object with __cuda_stream__, got {stream!r}")
    if handle == PER_THREAD_STREAM:
        raise InvalidArgumentError("stream must be usable from other threads, got the per-thread default stream (2): create a stream")
    return handle or LEGACY_STREAM
