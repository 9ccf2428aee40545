"""Open a bundle's graphs on a CUDA device, and find out which of them run there with all their nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from scm_runtime.bundle.manifest import Dtype, Manifest
from scm_runtime.common.log import log
from scm_runtime.devices.placement import CPU_PROVIDER
from scm_runtime.engines.cuda.capture import DeviceSession, EngineSessions, LiveGraphs
from scm_runtime.engines.cuda.engine import CudaEngine
from scm_runtime.engines.cuda.graph_options import GraphOptions, ways_to_open
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.engines.sessions import BundleSessions
from scm_runtime.errors import DeviceError, InferenceError, InvalidArgumentError, NativeOpsError, OutOfMemoryError
from scm_runtime.ort.open_session import open_session
from scm_runtime.ort.options import CONVOLUTION, SessionSettings
from scm_runtime.ort.session import Session

OpenSession = Callable[[Path, SessionSettings], Session]

# Graph from x [N, D] to [N]: 0 for a finite sample, otherwise NaN. tests/runtime/test_cuda_engine.py has the code that built it.
FINITE = Path(str(files("scm_runtime") / "finite.onnx"))


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
    """Open the graphs of the sampling loop and return an engine that runs them.

    Args:
        context: the device, stream and thread, which engines may share.
        folder: folder of the bundle.
        manifest: manifest of the bundle.
        dtype: dtype of the graphs to open.
        settings: settings of the sessions. The first provider of the placement is CUDA's, with the provider options given by the user.
        cuda_graph: whether to capture runs as CUDA graphs.
        gpu_mem_limit: maximum size of each session's arena in bytes; None for no limit.
        open_session: opens one graph.

    Raises:
        OutOfMemoryError: the weights do not fit into the device's memory.
        InferenceError, DeviceError, NativeOpsError: ``open_session`` raised it.
        InvalidArgumentError: the provider options contain one that is set by another argument.
    """
    opener = _Opener(context, settings, gpu_mem_limit, open_session)
    capture = cuda_graph and context.stream.can_capture

    def open_all() -> CudaEngine:
        graphs = BundleSessions(folder, manifest, dtype, opener.open)
        finite = opener.open_finite()
        sessions = (graphs.noise, graphs.step, finite, graphs.decode, *([graphs.combine] if manifest.samplers else []))
        live = LiveGraphs()
        device_sessions = EngineSessions(
            *(DeviceSession(context, session, live, all_on_device=_is_all_on_device(session), capture=capture) for session in sessions)
        )
        return CudaEngine(context, graphs, device_sessions, dtype, manifest)

    return context.run(open_all)


class _Opener:
    """Opens each graph fully on the device if ONNX Runtime accepts that, otherwise with some nodes on the CPU."""

    def __init__(self, context: CudaContext, settings: SessionSettings, gpu_mem_limit: int | None, open_session: OpenSession) -> None:
        self._context, self._settings, self._gpu_mem_limit, self._open_session = context, settings, gpu_mem_limit, open_session
        self._settings_for(settings, GraphOptions("cudnn", {}), cuda_graph=True)  # raises InvalidArgumentError before anything is opened

    def open(self, path: Path) -> Session:
        """Open a graph of the bundle."""
        # The optional graphs run on host arrays, which ONNX Runtime copies to the device as its nodes need them.
        if path.name.startswith(("encode.", "preview.", "text.")):
            return self._open_session(path, self._settings_for(self._settings, ways_to_open(path, self._settings)[-1], cuda_graph=False))
        return self._open(path, self._settings)

    def open_finite(self) -> Session:
        """Open the graph that flags samples with NaN or infinity. It is not part of the bundle, so it is not cached."""
        return self._open(FINITE, replace(self._settings, cache=None, library=None))

    def _open(self, path: Path, settings: SessionSettings) -> Session:
        """Open a graph with all nodes on the device in the first way that ONNX Runtime accepts, or with some nodes on the CPU if it accepts none.

        With ``enable_cuda_graph`` ONNX Runtime rejects a graph that has nodes on the CPU. Its captures are not used: every run has the ``gpu_graph_id`` -1.
        """
        *others, last = ways_to_open(path, settings)
        for way in others:
            try:
                return self._open_session(path, self._settings_for(settings, way, cuda_graph=True))
            except (DeviceError, NativeOpsError):
                raise
            except InferenceError as error:  # also OutOfMemoryError: packed weights are a copy of them
                log.debug("'%s' does not open with %s: %s", path.name, way, error)
        try:
            return self._open_session(path, self._settings_for(settings, last, cuda_graph=True))
        except (OutOfMemoryError, DeviceError, NativeOpsError):
            raise
        except InferenceError as error:  # if there is another reason, the last attempt raises it again
            log.debug("'%s' does not open with all nodes on the device: %s", path.name, error)
        session = self._open_session(path, self._settings_for(settings, last, cuda_graph=False))
        _report_cpu_nodes(path, session)
        return session

    def _settings_for(self, settings: SessionSettings, way: GraphOptions, *, cuda_graph: bool) -> SessionSettings:
        (provider, given), *rest = settings.placement.providers
        extra = {**way.provider_options, **given}
        handle = self._context.stream_handle
        options = cuda_options(self._context.index, gpu_mem_limit=self._gpu_mem_limit, cuda_graph=cuda_graph, stream_handle=handle, extra=extra)
        placement = replace(settings.placement, providers=((provider, options), *rest))
        session_options = {name: value for name, value in settings.session_options.items() if name != CONVOLUTION}  # which the way has followed
        return replace(settings, placement=placement, convolution=way.convolution, session_options=session_options)


def _report_cpu_nodes(path: Path, session: Session) -> None:
    """Log that a graph runs with copies and without CUDA graphs, why, and what helps."""
    placed = session.node_placement().get(CPU_PROVIDER, Counter[str]())
    operators = ", ".join(f"{count} {operator}" for operator, count in sorted(placed.items())) or "not recorded"
    if session.settings.library is None:
        remedy = "The native kernels need fewer of them: native_ops=True uses them, or says why they cannot be used."
    else:
        remedy = "Export the checkpoint again: newer versions of scm-export compute sizes when they export."
    log.info("'%s' runs with copies to the CPU and back, and without CUDA graphs: it has nodes on the CPU, %s. %s", path.name, operators, remedy)


def _is_all_on_device(session: Session) -> bool:
    """Return True if the session was opened with all nodes on the device."""
    return session.settings.placement.providers[0][1]["enable_cuda_graph"] == "1"


def cuda_options(
    index: int, *, gpu_mem_limit: int | None = None, cuda_graph: bool = True, stream_handle: int, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the options of ONNX Runtime's CUDA provider for one session.

    Args:
        index: index of the device.
        gpu_mem_limit: maximum size of the session's arena in bytes, without the CUDA context and the workspaces of cuDNN and cuBLAS; None for no limit.
        cuda_graph: whether runs may be captured. If so, ONNX Runtime rejects graphs with nodes on the CPU.
        stream_handle: handle of the stream that the session uses.
        extra: other provider options, which override the defaults.

    Raises:
        InvalidArgumentError: ``extra`` contains an option that is set by another argument.
    """
    arguments = {"device_id": "device", "user_compute_stream": "stream", "has_user_compute_stream": "stream", "enable_cuda_graph": "cuda_graph"}
    for name, argument in arguments.items():
        if name in (extra or {}) and not (name == "device_id" and str((extra or {})[name]) == str(index)):
            raise InvalidArgumentError(f"provider_options must not contain {name}: pass {argument}= instead")
    options = {
        # Batch sizes vary: doubling the arena for each larger batch would waste memory.
        "arena_extend_strategy": "kSameAsRequested",
        # An exhaustive search runs at the first call of each shape, and each batch size is a new shape. benchmarks/cuda_calls.py compares the two.
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    if gpu_mem_limit is not None:
        options["gpu_mem_limit"] = str(gpu_mem_limit)
    return {
        **options,
        **{name: str(value) for name, value in (extra or {}).items()},
        "device_id": str(index),
        "user_compute_stream": str(stream_handle),  # 0 would mean no stream: the legacy default stream has the handle 1 here
        "enable_cuda_graph": str(int(cuda_graph)),
    }
