"""Opens a bundle on a device: verifies its files, chooses the dtype, and opens the graphs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

from scm_runtime.bundle.checksums import check_files, sha256, stat_fingerprint
from scm_runtime.bundle.location import ResolvedBundle
from scm_runtime.bundle.manifest import WEIGHTS, Dtype, Manifest, read_manifest
from scm_runtime.cache.graph_cache import GraphCache
from scm_runtime.common.background import Background
from scm_runtime.common.checks import is_int
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.common.runs import RunRegistry
from scm_runtime.devices.placement import Placement
from scm_runtime.engines.engine import Engine
from scm_runtime.engines.host import HostEngine
from scm_runtime.engines.sessions import BundleSessions
from scm_runtime.errors import DeviceError, InvalidArgumentError, OutOfMemoryError
from scm_runtime.ort.native_ops import Library, NativeOpsStatus, check_native_ops, open_with_native_ops
from scm_runtime.ort.open_session import open_session
from scm_runtime.ort.options import CacheContext, SessionSettings, check_threads

OpenEngine = Callable[[Dtype, SessionSettings], Engine]


@dataclass(frozen=True)
class GeneratorInfo:
    """What a Generator runs, and where."""

    bundle: str
    """Name of the bundle, from its manifest."""
    dtype: str
    """Precision of the graphs: "fp32", "fp16" or "bf16"."""
    device: str
    """"cpu", "cuda:0", …; with ``providers=`` the short name of the first provider."""
    device_reason: str
    """Why this device is used."""
    provider: str
    """ONNX Runtime's name of the execution provider of the step graph, such as "CPUExecutionProvider"."""
    onnxruntime: str
    """Version of ONNX Runtime."""
    native_ops: bool
    """True if the kernels of the native library run; False if the function bodies in the graphs do."""
    native_ops_version: str | None
    """Version of the native library, or None if its kernels are not used."""
    native_ops_reason: str | None
    """Why the native kernels are not used, with the remedy; None if they are."""
    cuda_graph: bool = False
    """True if calls, or runs of the step graph, are to be captured as CUDA graphs, for a batch size each. The log names those of which a capture fails."""
    nodes: Mapping[str, int] = field(default_factory=dict)
    """Number of nodes of the step graph that each execution provider runs, after ONNX Runtime's optimizations."""


@dataclass(frozen=True)
class OpenBundle:
    """An open bundle, ready to sample."""

    folder: Path
    manifest: Manifest
    engine: Engine
    open_fp32: Callable[[], Engine]
    """Opens a second engine over the fp32 graphs, on the same device."""
    info: GeneratorInfo
    runs: RunRegistry
    """Registry of the runs of both engines."""


def open_bundle(
    bundle: ResolvedBundle,
    placement: Placement,
    *,
    dtype: Dtype | Literal["auto"],
    session_options: Mapping[str, object] | None,
    threads: int | None,
    native_ops: bool | Literal["auto"],
    cuda_graph: bool,
    gpu_mem_limit: int | None,
    stream: object | None,
    profile_dir: str | os.PathLike[str] | None,
    cache_dir: str | os.PathLike[str] | Literal[False] | None,
    verify_integrity: bool,
) -> OpenBundle:
    """Open a resolved bundle on a resolved device. The keyword arguments, and the errors, are those of ``Generator``."""
    threads, native_ops = check_threads(threads), check_native_ops(native_ops)
    if session_options is not None and not (isinstance(session_options, Mapping) and all(isinstance(name, str) for name in session_options)):
        raise InvalidArgumentError(f"session_options must be a dict by names of ONNX Runtime's session options, got {session_options!r}")
    _check_cuda(placement, cuda_graph=cuda_graph, gpu_mem_limit=gpu_mem_limit, stream=stream)
    folder, manifest = bundle.folder, read_manifest(bundle.folder)
    chosen = _choose_dtype(dtype, manifest, placement)
    cache = GraphCache.locate(cache_dir)

    def check(names: Iterable[str], *, hashes: bool, between_chunks: Callable[[], None] | None = None) -> None:
        digest_of = partial(cache.checksums.sha256 if cache else sha256, between_chunks=between_chunks)
        check_files(folder, manifest, names, hashes=hashes, digest_of=digest_of)

    names = tuple(manifest.files) if bundle.repository is None else manifest.files_for(chosen)
    bundle.fetch(names)
    check([name for name in names if name != WEIGHTS], hashes=verify_integrity)
    check([WEIGHTS], hashes=False)
    base = SessionSettings(placement, threads=threads, session_options=dict(session_options or {}), profile_dir=_folder("profile_dir", profile_dir))

    def settings(library: Library | None) -> SessionSettings:
        context = None
        if cache is not None:
            # A checksum that was not verified must not identify a graph: the file may be another one.
            here = {name: entry.sha256 for name, entry in manifest.files.items() if (folder / name).is_file()}
            checksums = here if verify_integrity else {name: stat_fingerprint(folder / name) for name in here}
            context = CacheContext(cache, checksums, cache.checksums.sha256(library.path) if library else None)
        return replace(base, library=library.path if library else None, cache=context)

    if placement.index is None:
        opener = _on_host(folder, manifest)
    else:
        opener = _on_cuda(folder, manifest, placement.index, stream, cuda_graph=cuda_graph, gpu_mem_limit=gpu_mem_limit)

    def open_engine() -> tuple[Engine, NativeOpsStatus]:
        return open_with_native_ops(manifest, native_ops, placement, lambda library: opener(chosen, settings(library)))

    def verify_weights(between_chunks: Callable[[], None]) -> None:
        check([WEIGHTS], hashes=True, between_chunks=between_chunks)

    engine, status = _open_while_verifying(open_engine, verify_weights) if verify_integrity else open_engine()

    def open_fp32() -> Engine:
        bundle.fetch(fp32 := manifest.files_for("fp32"))
        check(fp32, hashes=verify_integrity)
        return opener("fp32", settings(status.library))

    info = GeneratorInfo(
        bundle=manifest.name,
        dtype=chosen,
        device=placement.device,
        device_reason=placement.reason,
        provider=engine.provider,
        onnxruntime=load_onnxruntime().__version__,
        native_ops=status.library is not None,
        native_ops_version=status.library.info.version if status.library else None,
        native_ops_reason=status.reason,
        cuda_graph=engine.cuda_graph,
        nodes={provider: ops.total() for provider, ops in engine.run(lambda: engine.graphs().step.node_placement()).items()},
    )
    return OpenBundle(folder, manifest, engine, open_fp32, info, base.runs)


def _open_while_verifying(
    open_engine: Callable[[], tuple[Engine, NativeOpsStatus]], verify_weights: Callable[[Callable[[], None]], None]
) -> tuple[Engine, NativeOpsStatus]:
    """Open an engine while its weights are hashed in another thread, which takes as long. Raises the errors of both, and that of the weights if both fail.

    Damaged values do no harm until the weights are verified, and come into no cached graph: see private_copy.py.
    """
    verification = Background(verify_weights, "scm-runtime checksum")
    try:
        try:
            engine, status = open_engine()
        except (DeviceError, OutOfMemoryError):  # not by damaged weights
            raise
        except Exception:
            verification.finish()
            raise
        try:
            verification.finish()
        except BaseException:
            engine.close()
            raise
    finally:
        verification.stop()
    return engine, status


def _on_host(folder: Path, manifest: Manifest) -> OpenEngine:
    def open_engine(dtype: Dtype, settings: SessionSettings) -> Engine:
        return HostEngine(BundleSessions(folder, manifest, dtype, lambda path: open_session(path, settings)), dtype, manifest.initial_scale)

    return open_engine


def _on_cuda(folder: Path, manifest: Manifest, index: int, stream: object | None, *, cuda_graph: bool, gpu_mem_limit: int | None) -> OpenEngine:
    from scm_runtime.engines.cuda.open_engine import open_cuda_engine  # needs the packages of the extra gpu
    from scm_runtime.engines.cuda.thread import CudaContext

    context = CudaContext(index, stream)  # both engines share its thread, stream and memory

    def open_engine(dtype: Dtype, settings: SessionSettings) -> Engine:
        return open_cuda_engine(context, folder, manifest, dtype, settings, cuda_graph=cuda_graph, gpu_mem_limit=gpu_mem_limit)

    return open_engine


def _choose_dtype(dtype: Dtype | Literal["auto"], manifest: Manifest, placement: Placement) -> Dtype:
    known = manifest.dtypes
    if dtype == "auto":
        return next((half for half in known if half != "fp32"), "fp32") if placement.index is not None else "fp32"
    if dtype not in known:
        raise InvalidArgumentError(f"dtype must be 'auto' or one of this bundle's, {', '.join(known)}; got {dtype!r}")
    return dtype


def _check_cuda(placement: Placement, *, cuda_graph: object, gpu_mem_limit: object, stream: object) -> None:
    """Raise InvalidArgumentError if an argument is out of range or not for this device."""
    if not isinstance(cuda_graph, bool):
        raise InvalidArgumentError(f"cuda_graph must be True or False, got {cuda_graph!r}")
    if gpu_mem_limit is not None and (not is_int(gpu_mem_limit) or cast(int, gpu_mem_limit) < 1):
        raise InvalidArgumentError(f"gpu_mem_limit must be a number of bytes, or None for no limit, got {gpu_mem_limit!r}")
    for name, value in {"gpu_mem_limit": gpu_mem_limit, "stream": stream}.items():
        if value is not None and placement.index is None:
            raise InvalidArgumentError(f"{name} is for device='cuda', got {value!r} with the device {placement.device!r} ({placement.reason})")


def _folder(name: str, path: str | os.PathLike[str] | None) -> Path | None:
    if path is None:
        return None
    try:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, TypeError, ValueError) as error:  # ValueError: a null character
        shown = str(path) if isinstance(path, os.PathLike) else path
        raise InvalidArgumentError(f"{name} must be a folder that can be written to, got {shown!r}: {getattr(error, 'strerror', None) or error}") from error
    return folder
