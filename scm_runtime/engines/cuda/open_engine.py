"""Opens a bundle's graphs on a CUDA device, and finds out which of them are on it with all their nodes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from scm_runtime.bundle.manifest import Dtype, Manifest
from scm_runtime.engines.cuda.engine import CudaEngine
from scm_runtime.engines.cuda.options import cuda_options
from scm_runtime.engines.cuda.slots import Graph, Graphed
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.engines.sessions import BundleSessions
from scm_runtime.errors import DeviceError, InferenceError, NativeOpsError, OutOfMemoryError
from scm_runtime.ort.open_session import open_session
from scm_runtime.ort.options import SessionSettings
from scm_runtime.ort.session import Session

OpenSession = Callable[[Path, SessionSettings], Session]

# x [N, D] to [N]: 0 where all is finite, NaN where not. tests/runtime/test_cuda_engine.py holds what it was made of.
FINITE = Path(str(files("scm_runtime") / "finite.onnx"))

_log = logging.getLogger("scm_runtime")


def open_cuda_engine(
    context: CudaContext,
    folder: Path,
    manifest: Manifest,
    dtype: Dtype,
    settings: SessionSettings,
    *,
    cuda_graph: bool = True,
    gpu_mem_limit: int | None = None,
    open_session: OpenSession = open_session,
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
    capture = cuda_graph and context.gpu.can_capture

    def open_all() -> CudaEngine:
        graphs = BundleSessions(folder, manifest, dtype, opener.open)
        finite = opener.open_finite()
        sessions = (graphs.noise, graphs.step, finite, graphs.decode, *([graphs.combine] if manifest.samplers else []))
        graphed = Graphed(*(Graph(context, session, resident=_is_resident(session), capture=capture) for session in sessions))
        return CudaEngine(context, graphs, graphed, dtype, manifest)

    return context.run(open_all)


class _Opener:
    def __init__(self, context: CudaContext, settings: SessionSettings, gpu_mem_limit: int | None, open_session: OpenSession) -> None:
        (provider, extra), *rest = settings.placement.providers

        def settings_for(cuda_graph: bool) -> SessionSettings:
            options = cuda_options(context.index, gpu_mem_limit=gpu_mem_limit, cuda_graph=cuda_graph, stream_handle=context.stream_handle, extra=extra)
            return replace(settings, placement=replace(settings.placement, providers=((provider, options), *rest)))

        self._anyhow, self._whole = settings_for(False), settings_for(True)
        self._open_session = open_session

    def open(self, path: Path) -> Session:
        """Open a graph of the bundle."""
        # The optional graphs are called with the host's arrays, which ONNX Runtime copies for each node as it is needed.
        if path.name.startswith(("encode.", "preview.")):
            return self._open_session(path, self._anyhow)
        return self._open(path, self._whole, self._anyhow)

    def open_finite(self) -> Session:
        """Open the graph that looks for NaN and infinity. It is no part of the bundle: the cache does not know it."""
        whole, anyhow = (replace(settings, cache=None, library=None) for settings in (self._whole, self._anyhow))
        return self._open(FINITE, whole, anyhow)

    def _open(self, path: Path, whole: SessionSettings, anyhow: SessionSettings) -> Session:
        """With all nodes on the device, or else with some on the CPU.

        ONNX Runtime refuses what cannot be on the device as a whole when it is to be ready for CUDA graphs, so it is asked to be, whether any is captured
        or not: a run says which graph it is, or none.
        """
        try:
            return self._open_session(path, whole)
        except (OutOfMemoryError, DeviceError, NativeOpsError):
            raise
        except InferenceError as error:  # what is wrong otherwise comes again
            session = self._open_session(path, anyhow)
            _log.info("'%s' runs with copies to the CPU and back, and without CUDA graphs: %s", path.name, error)
            return session


def _is_resident(session: Session) -> bool:
    return session.settings.placement.providers[0][1]["enable_cuda_graph"] == "1"
