"""How ONNX Runtime's CUDA provider is set up."""

from __future__ import annotations

from collections.abc import Mapping

from scm_runtime.errors import InvalidArgumentError


def cuda_options(
    index: int, *, gpu_mem_limit: int | None = None, cuda_graph: bool = True, stream_handle: int, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Options of ONNX Runtime's CUDA provider for one session.

    Args:
        index: of the device.
        gpu_mem_limit: bytes of the session's arena; cuDNN's and cuBLAS's workspaces and the context come on top.
        cuda_graph: to be ready for CUDA graphs; ONNX Runtime then refuses graphs with nodes on the CPU.
        stream_handle: of the stream that the session works on.
        extra: the caller's own, which take the place of the defaults.

    Raises:
        InvalidArgumentError: ``extra`` names what has an argument of its own.
    """
    own = {"device_id": "device", "user_compute_stream": "stream", "has_user_compute_stream": "stream", "enable_cuda_graph": "cuda_graph"}
    for name, argument in own.items():
        if name in (extra or {}) and not (name == "device_id" and str((extra or {})[name]) == str(index)):
            raise InvalidArgumentError(f"provider_options must leave {name} out: give {argument}= instead")
    options = {
        # Batches come in all sizes: doubling the arena for each larger one would take memory that nothing uses.
        "arena_extend_strategy": "kSameAsRequested",
        # An exhaustive search runs at the first call of every shape, and batches make new shapes. benchmarks/cuda.py compares the two.
        "cudnn_conv_algo_search": "HEURISTIC",
        # fp32 is what the other dtypes are compared with and what overflowing samples are done again in. Who wants speed takes fp16 or bf16.
        "use_tf32": "0",
    }
    if gpu_mem_limit is not None:
        options["gpu_mem_limit"] = str(gpu_mem_limit)
    return {
        **options,
        **{name: str(value) for name, value in (extra or {}).items()},
        "device_id": str(index),
        "user_compute_stream": str(stream_handle),  # 0 would mean none: the default stream is LEGACY here
        "enable_cuda_graph": str(int(cuda_graph)),
    }
