"""Opens a bundle's graphs on a CUDA device, and finds out which of them are on it with all their nodes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from scm_runtime.bundle.manifest import Dtype, Manifest
from scm_runtime.engines.cuda.capture import DeviceSession, EngineSessions
from scm_runtime.engines.cuda.engine import CudaEngine
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.engines.sessions import Graphs
from scm_runtime.errors import DeviceError, InferenceError, InvalidArgumentError, NativeOpsError, OutOfMemoryError
from scm_runtime.ort.session import Session, Settings

OpenSession = Callable[[Path, Settings], Session]

# x [N, D] to [N]: 0 where all is finite, NaN where not. tests/runtime/test_cuda_engine.py holds what it was made of.
FINITE = Path(str(files("scm_runtime") / "finite.onnx"))

_log = logging.getLogger("scm_runtime")


def open_cuda_engine(
    context: CudaContext,
    folder: Path,
    manifest: Manifest,
    dtype: Dtype,
    settings: Settings,
    *,
    cuda_graph: bool = True,
    gpu_mem_limit: int | None = None,
    open_session: OpenSession = Session,
) -> CudaEngine:
    """Open noise, step and decode, and work with them.

    Args:
        context: the device, stream and thread; engines share it.
        folder: of the bundle.
        manifest: of the bundle.
        dtype: which graphs.
        settings: of the sessions; the placement's first provider is CUDA's, with the caller's own options if there are any.
        cuda_graph: whether to capture what runs again and again.
        gpu_mem_limit: bytes that each graph's arena may take; None for all there is.
        open_session: opens one graph.

    Raises:
        OutOfMemoryError: the weights do not fit.
        InferenceError, DeviceError, NativeOpsError: what ``open_session`` raises.
        InvalidArgumentError: the provider's options name what has an argument of its own.
    """
    opener = _Opener(context, settings, gpu_mem_limit, open_session)
    capture = cuda_graph and context.stream.can_capture

    def open_all() -> CudaEngine:
        graphs = Graphs(folder, manifest, dtype, opener.open)
        finite = opener.open_finite()
        sessions = (graphs.noise, graphs.step, finite, graphs.decode, *([graphs.combine] if manifest.samplers else []))
        device_sessions = EngineSessions(*(DeviceSession(context, session, all_on_device=_is_all_on_device(session), capture=capture) for session in sessions))
        return CudaEngine(context, graphs, device_sessions, dtype, manifest)

    return context.run(open_all)


class _Opener:
    def __init__(self, context: CudaContext, settings: Settings, gpu_mem_limit: int | None, open_session: OpenSession) -> None:
        (provider, extra), *rest = settings.placement.providers

        def settings_for(cuda_graph: bool) -> Settings:
            options = cuda_options(context.index, gpu_mem_limit=gpu_mem_limit, cuda_graph=cuda_graph, stream_handle=context.stream_handle, extra=extra)
            return replace(settings, placement=replace(settings.placement, providers=((provider, options), *rest)))

        self._with_cpu_nodes, self._fully_on_device = settings_for(False), settings_for(True)
        self._open_session = open_session

    def open(self, path: Path) -> Session:
        """Open a graph of the bundle."""
        # The optional graphs are called with the host's arrays, which ONNX Runtime copies for each node as it is needed.
        if path.name.startswith(("encode.", "preview.")):
            return self._open_session(path, self._with_cpu_nodes)
        return self._open(path, self._fully_on_device, self._with_cpu_nodes)

    def open_finite(self) -> Session:
        """Open the graph that looks for NaN and infinity. It is no part of the bundle: the cache does not know it."""
        fully_on_device, with_cpu_nodes = (replace(settings, cached=None, library=None) for settings in (self._fully_on_device, self._with_cpu_nodes))
        return self._open(FINITE, fully_on_device, with_cpu_nodes)

    def _open(self, path: Path, fully_on_device: Settings, with_cpu_nodes: Settings) -> Session:
        """With all nodes on the device, or else with some on the CPU.

        ONNX Runtime refuses what cannot be on the device as a whole when it is to be ready for CUDA graphs, so it is asked to be, whether any is captured
        or not: a run says which graph it is, or none.
        """
        try:
            return self._open_session(path, fully_on_device)
        except (OutOfMemoryError, DeviceError, NativeOpsError):
            raise
        except InferenceError as error:  # what is wrong otherwise comes again
            session = self._open_session(path, with_cpu_nodes)
            _log.info("'%s' runs with copies to the CPU and back, and without CUDA graphs: %s", path.name, error)
            return session


def _is_all_on_device(session: Session) -> bool:
    return session.settings.placement.providers[0][1]["enable_cuda_graph"] == "1"


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
