"""Opens ONNX graphs: from the cache of optimized graphs if it has them, with the native library if it is used."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scm_runtime.bundle import hub
from scm_runtime.bundle.manifest import WEIGHTS
from scm_runtime.cache.graph_cache import DATA, GRAPH, GraphCache
from scm_runtime.cache.key import graph_key, is_cacheable
from scm_runtime.cache.private_copy import ChangedError, NoRoomError
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.common.log import log, log_once
from scm_runtime.common.memory import MORE_MEMORY, NOEXEC, is_out_of_memory, out_of_memory_error, unmapped_library
from scm_runtime.common.message_text import escape_controls
from scm_runtime.devices.placement import CUDA_PROVIDER, check_cudnn, missing_cudnn
from scm_runtime.errors import DeviceError, InferenceError, NativeOpsError
from scm_runtime.ort.graph_check import check_graph
from scm_runtime.ort.options import CONVOLUTION, CacheContext, SessionSettings, configure
from scm_runtime.ort.session import Session

# Graph optimizers of ONNX Runtime that allocate new weights, by name.
COPYING_OPTIMIZERS = ("ConstantFolding", "ConvMulFusion", "NchwcTransformer")

# Provider options that do not affect the optimized graph and differ between processes.
VOLATILE_OPTIONS = ("user_compute_stream", "gpu_mem_limit", "enable_cuda_graph")

COMPILED = "compiled nodes"  # ONNX Runtime's words when it cannot save a graph that TensorRT, OpenVINO or CoreML has compiled in part

SetOptions = Callable[[Any], None]
"""Makes the last changes to an ``onnxruntime.SessionOptions``."""


def open_session(path: Path, settings: SessionSettings | None = None) -> Session:
    """Open a graph.

    Args:
        path: the ``.onnx`` file; its external data lie beside it.
        settings: by default on the CPU, without native library and cache.

    Raises:
        InferenceError: ONNX Runtime cannot open the graph, or ``check_graph`` refuses it.
        DeviceError: ONNX Runtime fell back to another execution provider, or the graph needs cuDNN, which is missing.
        NativeOpsError: ONNX Runtime and the native library do not fit together.
        InvalidArgumentError: ONNX Runtime has no such session option.
        OutOfMemoryError: the weights do not fit into memory.
        GeneratorClosedError: the process is exiting.
    """
    settings = settings or SessionSettings()

    def create(path: Path, set_options: SetOptions) -> Any:
        return _create(path, settings, set_options)

    context = settings.cache
    if context is None or settings.low_memory or settings.profile_dir is not None or not is_cacheable(settings.session_options):
        session = create(path, _keep_options)
    else:
        session = open_cached(context.cache, path, _key(path, settings, context), create, checksums=context.checksums)
    opened = Session(path, session, settings)
    if settings.placement.device != "cpu":
        check_cudnn(str(path), opened.node_placement())
    return opened


def open_cached(cache: GraphCache, path: Path, key: str, create: Callable[[Path, SetOptions], Any], *, checksums: Mapping[str, str]) -> Any:
    """Open the optimized graph in the cache, adding it first if it is missing; open the original if that fails.

    Args:
        cache: the cache of optimized graphs.
        path: the original ``.onnx`` file.
        key: its key in the cache, from ``key.graph_key``.
        create: opens the graph at a path, with new session options to which it applies the given changes last. It is called up to three times; what it
            returns before the last call is dropped.
        checksums: of the graph and its weights by name, as ``GraphCache.add`` takes them.

    Returns:
        What ``create`` returned.

    Raises:
        Exception: whatever ``create`` raises for the original.
    """
    failure: Exception | None = None
    reopen_error: Exception | None = None
    graph = cache.find(key)
    if graph is None and not cache.is_uncacheable(key):
        try:
            # The session that saves the graph is dropped: it holds copies of the weights, which a session over the cached graph maps.
            graph = cache.add(key, path, checksums, lambda copy, folder: create(copy, _save_to(folder)))
        except Exception as error:  # noqa: BLE001  # ONNX Runtime's exceptions have no common base class
            failure = error.with_traceback(None)  # its frames would keep sessions alive until the garbage collector runs
            graph = cache.find(key, verify=False)  # another process may have added it
    if graph is not None:
        try:
            session = create(graph, _skip_optimization)
        except MemoryError:  # the original needs more
            raise
        except Exception as error:  # noqa: BLE001  # as above
            reopen_error = error.with_traceback(None) if cache.find(key) else None  # another process may have removed it
        else:
            cache.mark_used(key)
            return session
    session = create(path, _keep_options)  # an error here is not the cache's: it is raised, and nothing is logged about the cache
    if reopen_error is not None:
        cache.mark_uncacheable(key, path, f"cannot be opened again: {escape_controls(str(reopen_error))}")
    elif failure is not None and COMPILED in str(failure):
        cache.mark_uncacheable(key, path, f"cannot be saved: {escape_controls(str(failure))}")
    elif isinstance(failure, ChangedError):
        log.warning("nothing is cached of a graph: %s", failure)
    elif failure is not None and not isinstance(failure, NoRoomError):  # a read-only folder, a full disk: this may change
        log_once(logging.WARNING, f"optimized graphs are not cached: {escape_controls(str(failure))}", key="optimized graphs are not cached")
    return session


def _key(path: Path, settings: SessionSettings, context: CacheContext) -> str:
    providers = [(name, {key: value for key, value in options.items() if key not in VOLATILE_OPTIONS}) for name, options in settings.placement.providers]
    return graph_key(
        graph=context.checksums[path.name],
        weights=context.checksums[WEIGHTS],
        providers=providers,
        device=settings.placement.hardware,
        library=context.library if settings.library else None,
        session_options={**({CONVOLUTION: "own"} if settings.convolution == "own" else {}), **settings.session_options},
    )


def _keep_options(_options: Any) -> None:
    """Open a graph as the settings say."""


def _save_to(folder: Path) -> SetOptions:
    def set_options(options: Any) -> None:
        options.optimized_model_filepath = os.fspath(folder / GRAPH)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", DATA)

    return set_options


def _skip_optimization(options: Any) -> None:
    options.graph_optimization_level = load_onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL


def _create(path: Path, settings: SessionSettings, set_options: SetOptions) -> Any:
    """Create the ``onnxruntime.InferenceSession`` over a graph: the original, or a copy of it in the cache."""
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    configure(options, settings, path.stem)
    set_options(options)
    if settings.library is not None:
        try:
            options.register_custom_ops_library(os.fspath(settings.library))
        except Exception as error:
            if is_out_of_memory(error):
                raise out_of_memory_error(f"the library of native kernels '{settings.library}'", error, MORE_MEMORY) from error
            if unmapped_library(error):
                raise NativeOpsError(f"the system does not run code from '{settings.library}': {NOEXEC}") from error
            raise NativeOpsError(
                f"ONNX Runtime {ort.__version__} cannot use the library of native kernels '{settings.library}': {error}. "
                "Install an ONNX Runtime and an scm-runtime that fit, or run without the kernels: native_ops=False"
            ) from error
    with settings.runs.run():  # the end of the process waits for it
        try:
            check_graph(path)
            return _create_with_weights(path, options, settings)
        except Exception as error:
            if is_out_of_memory(error):
                raise out_of_memory_error(f"the weights of '{path}' on {settings.placement.device}", error, MORE_MEMORY) from error
            if "pthread_create" in str(error):
                raise InferenceError(f"ONNX Runtime cannot start its threads: the system's limit is reached. Raise it, or use threads=1. ({error})") from error
            if "cudnn" in str(error).lower() and (reason := missing_cudnn(settings.placement.providers[0][0])):
                raise DeviceError(f"'{path}' needs {reason}") from error
            remedy = "Upgrade it, or export the checkpoint again" + (", or run without the native kernels: native_ops=False" if settings.library else ".")
            reason = escape_controls(str(error))  # it may name nodes and operators of the graph
            raise InferenceError(f"ONNX Runtime {ort.__version__} cannot open '{path}': {reason}. {remedy}") from error


def _quiet_providers(providers: Iterable[tuple[str, Mapping[str, str]]]) -> list[tuple[str, dict[str, str]]]:
    """Return the providers and their options without the device of the CUDA provider if that is the first one, which is ONNX Runtime's default.

    If the device is named, ONNX Runtime 1.29 and newer look for a plugin, and write a line to stderr if none is registered. The line comes from the logger
    that all sessions of the process share: its level belongs to the host, and cannot be read in order to restore it.
    """
    return [(name, {key: value for key, value in options.items() if (name, key, value) != (CUDA_PROVIDER, "device_id", "0")}) for name, options in providers]


def _create_with_weights(path: Path, options: Any, settings: SessionSettings) -> Any:
    """Create the session; pass it the weights from memory if ONNX Runtime does not follow the link to them in the Hugging Face cache.

    ONNX Runtime reads external data only in the folder of the graph, so that a hostile graph cannot read other files. It makes an exception for the cache
    of huggingface_hub: 1.24.1 makes none; 1.24.2 to 1.31 follow a link if the weights lie in the same folder as the file that the graph links to, which
    is not so for large files since huggingface_hub 2; 1.32 always follows it. The weights from memory take their size in memory.
    """

    def attempt() -> Any:
        return load_onnxruntime().InferenceSession(
            os.fspath(path),
            options,
            providers=_quiet_providers(settings.placement.providers),
            disabled_optimizers=list(COPYING_OPTIMIZERS) if settings.low_memory else [],
            enable_fallback=0,  # a fallback prints to the host's stdout
        )

    try:
        return attempt()
    except Exception:
        blob = hub.blob(path.with_name(WEIGHTS))
        if blob is None:
            raise
        weights = np.memmap(blob, np.uint8, "r")
        options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [len(weights)])
        session = attempt()
        session._scm_weights = weights  # ONNX Runtime keeps the options, and with them this pointer
        return session
