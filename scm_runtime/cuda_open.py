"""Opens a bundle's graphs on a CUDA device, with CUDA graphs where every node of a graph can be on the device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from scm_runtime.bundle import Dtype, Manifest
from scm_runtime.cuda_engine import CudaEngine
from scm_runtime.cuda_options import cuda_options
from scm_runtime.cuda_slots import Graph, Graphed
from scm_runtime.cuda_thread import CudaContext
from scm_runtime.errors import DeviceError, InferenceError, NativeOpsError, OutOfMemoryError
from scm_runtime.graphs import Graphs
from scm_runtime.session import Session, Settings

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
    opener = _Opener(context, settings, cuda_graph=cuda_graph and context.gpu.can_capture, gpu_mem_limit=gpu_mem_limit, open_session=open_session)

    def open_all() -> CudaEngine:
        graphs = Graphs(folder, manifest, dtype, opener.open)
        finite = opener.open_finite()
        graphed = Graphed(*(Graph(context, session, capture=opener.captures(session)) for session in (graphs.noise, graphs.step, finite, graphs.decode)))
        return CudaEngine(context, graphs, graphed, dtype, manifest)

    return context.run(open_all)


class _Opener:
    def __init__(self, context: CudaContext, settings: Settings, *, cuda_graph: bool, gpu_mem_limit: int | None, open_session: OpenSession) -> None:
        (provider, extra), *rest = settings.placement.providers

        def settings_for(capture: bool) -> Settings:
            options = cuda_options(context.index, gpu_mem_limit=gpu_mem_limit, cuda_graph=capture, stream_handle=context.stream_handle, extra=extra)
            return replace(settings, placement=replace(settings.placement, providers=((provider, options), *rest)))

        self._plain, self._capturing = settings_for(False), settings_for(True)
        self._cuda_graph, self._open_session = cuda_graph, open_session

    def open(self, path: Path) -> Session:
        """Open a graph of the bundle so that its runs can be captured, or else so that they cannot."""
        # The optional graphs are called with the host's arrays, which have no fixed addresses.
        if path.name.startswith(("encode.", "preview.")):
            return self._open_session(path, self._plain)
        return self._open(path, self._plain, self._capturing)

    def open_finite(self) -> Session:
        """Open the graph that looks for NaN and infinity. It is no part of the bundle: the cache does not know it."""
        return self._open(FINITE, replace(self._plain, cached=None, library=None), replace(self._capturing, cached=None, library=None))

    def _open(self, path: Path, plain: Settings, capturing: Settings) -> Session:
        if not self._cuda_graph:
            return self._open_session(path, plain)
        try:
            return self._open_session(path, capturing)
        except (OutOfMemoryError, DeviceError, NativeOpsError):
            raise
        except InferenceError as error:  # most often a node without a CUDA kernel; what is wrong otherwise comes again
            session = self._open_session(path, plain)
            _log.info("'%s' runs without CUDA graphs: %s", path.name, error)
            return session

    def captures(self, session: Session) -> bool:
        """Whether a session's runs can be captured."""
        return session.settings.placement.providers[0][1]["enable_cuda_graph"] == "1"
