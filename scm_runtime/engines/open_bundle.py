"""Opens a bundle on a device: its files are checked, its dtype chosen, its graphs opened with the kernels or without."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from scm_runtime.bundle.checksums import check_files, stat_fingerprint
from scm_runtime.bundle.location import ResolvedBundle
from scm_runtime.bundle.manifest import Dtype, Manifest, read_manifest
from scm_runtime.cache.graph_cache import GraphCache
from scm_runtime.common.checks import is_int
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.common.runs import RunRegistry
from scm_runtime.devices.placement import Placement
from scm_runtime.engines.engine import Engine, HostEngine
from scm_runtime.engines.info import GeneratorInfo
from scm_runtime.engines.sessions import Graphs
from scm_runtime.errors import InvalidArgumentError
from scm_runtime.ort.native_ops import Library, check_native_ops, open_with_kernels
from scm_runtime.ort.session import Cached, Session, Settings, check_threads

OpenEngine = Callable[[Dtype, Settings], Engine]


@dataclass(frozen=True)
class Opened:
    """A bundle, ready to sample."""

    folder: Path
    manifest: Manifest
    engine: Engine
    open_fp32: Callable[[], Engine]
    """Opens another engine, over the fp32 graphs, in the same place."""
    info: GeneratorInfo
    runs: RunRegistry
    """Those of both engines."""


def open_bundle(
    found: ResolvedBundle,
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
) -> Opened:
    """Open what was found where it was placed. The arguments are those of Generator, and so are the errors."""
    threads, native_ops = check_threads(threads), check_native_ops(native_ops)
    if session_options is not None and not (isinstance(session_options, Mapping) and all(isinstance(name, str) for name in session_options)):
        raise InvalidArgumentError(f"session_options must be a dict by names of ONNX Runtime's session options, got {session_options!r}")
    _check_cuda(placement, cuda_graph=cuda_graph, gpu_mem_limit=gpu_mem_limit, stream=stream)
    folder, manifest = found.folder, read_manifest(found.folder)
    chosen = _choose_dtype(dtype, manifest, placement)
    cache = GraphCache.find(cache_dir)

    def fetch(names: Iterable[str]) -> None:
        found.fetch(names)
        check_files(folder, manifest, names, hashes=verify_integrity, digest_of=cache.verified.sha256 if cache else None)

    fetch(tuple(manifest.files) if found.repository is None else manifest.files_for(chosen))
    base = Settings(placement, threads=threads, session_options=dict(session_options or {}), profile_dir=_folder("profile_dir", profile_dir))

    def settings(library: Library | None) -> Settings:
        cached = None
        if cache is not None:
            # A sum that nobody compared must not name a graph: another file's may stand under it.
            here = {name: entry.sha256 for name, entry in manifest.files.items() if (folder / name).is_file()}
            sums = here if verify_integrity else {name: stat_fingerprint(folder / name) for name in here}
            cached = Cached(cache, sums, cache.verified.sha256(library.path) if library else None)
        return replace(base, library=library.path if library else None, cached=cached)

    if placement.index is None:
        opener = _on_host(folder, manifest)
    else:
        opener = _on_cuda(folder, manifest, placement.index, stream, cuda_graph=cuda_graph, gpu_mem_limit=gpu_mem_limit)
    engine, kernels = open_with_kernels(manifest, native_ops, placement, lambda library: opener(chosen, settings(library)))

    def open_fp32() -> Engine:
        fetch(manifest.files_for("fp32"))
        return opener("fp32", settings(kernels.library))

    info = GeneratorInfo(
        bundle=manifest.name,
        dtype=chosen,
        device=placement.device,
        device_reason=placement.reason,
        provider=engine.provider,
        onnxruntime=load_onnxruntime().__version__,
        native_ops=kernels.library is not None,
        native_ops_version=kernels.library.facts.version if kernels.library else None,
        native_ops_reason=kernels.reason,
        cuda_graph=engine.cuda_graph,
    )
    return Opened(folder, manifest, engine, open_fp32, info, base.runs)


def _on_host(folder: Path, manifest: Manifest) -> OpenEngine:
    def open_engine(dtype: Dtype, settings: Settings) -> Engine:
        return HostEngine(Graphs(folder, manifest, dtype, lambda path: Session(path, settings)), dtype, manifest.initial_scale)

    return open_engine


def _on_cuda(folder: Path, manifest: Manifest, index: int, stream: object | None, *, cuda_graph: bool, gpu_mem_limit: int | None) -> OpenEngine:
    from scm_runtime.engines.cuda.open_engine import open_cuda_engine  # for those with a GPU
    from scm_runtime.engines.cuda.thread import CudaContext

    context = CudaContext(index, stream)  # one for all engines: thread, stream and memory

    def open_engine(dtype: Dtype, settings: Settings) -> Engine:
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
    """Raise InvalidArgumentError for arguments out of range, or that do not fit the device."""
    if not isinstance(cuda_graph, bool):
        raise InvalidArgumentError(f"cuda_graph must be True or False, got {cuda_graph!r}")
    if gpu_mem_limit is not None and (not is_int(gpu_mem_limit) or cast(int, gpu_mem_limit) < 1):
        raise InvalidArgumentError(f"gpu_mem_limit must be a number of bytes or None for all there is, got {gpu_mem_limit!r}")
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
