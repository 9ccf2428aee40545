"""Fixtures for several test folders: a tiny checkpoint with random weights, and the bundle exported from it."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import gc
import logging
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from old_click import complete_click
from scm_runtime import Generator, MissingDependencyError
from scm_runtime.common.load_onnxruntime import load_onnxruntime

complete_click()  # before test modules import CliRunner
TINY_LABELS = ("ant", "bee", "cat", "dog")

# Files that take longest, in this order. pytest-xdist gives whole files to its workers: a slow one that starts last leaves the other worker idle.
SLOWEST_FIRST = (
    "end_to_end/test_readme.py",
    "export/test_export.py",
    "export/test_sana_sprint.py",
    "export/test_consistency.py",
    "test_benchmarks.py",
    "end_to_end/test_wheel.py",
    "export/test_verify.py",
    "export/test_sd_distilled.py",
    "export/test_latent_consistency.py",
    "export/test_text_encoders.py",
    "end_to_end/test_samplers.py",
    "end_to_end/test_digits_quality.py",
    "export/test_module_family.py",
    "export/test_edm2_pickles.py",
    "export/test_autoencoders.py",
    "export/test_kept_and_compiled.py",
    "export/test_report.py",
    "export/test_memory.py",
    "runtime/test_terminal.py",
    "test_hostile_checkpoints.py",
)


def pytest_configure() -> None:
    os.environ["SCM_CACHE_DIR"] = ""  # no test depends on a cache of an earlier run; the tests of the cache set their own folder
    for name in ("onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.WARNING)  # hundreds of lines per export


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := _no_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(SLOWEST_FIRST)}
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (ranks.get(item.path, len(ranks)), -sizes[item.path]))  # stable: the order within a file stays


def pytest_collection_finish() -> None:
    """Take the modules imported so far out of garbage collection: with torch and diffusers, each full collection visits 650 000 of their objects."""
    gc.collect()
    gc.freeze()


def _no_gpu() -> str | None:
    """Return the reason why tests marked gpu cannot run here, or None if they can."""
    try:
        import torch
    except ImportError as error:
        return str(error)
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if "CUDAExecutionProvider" not in load_onnxruntime().get_available_providers():
        return "this ONNX Runtime has no CUDA provider"
    return None


def pytest_report_header() -> list[str]:
    versions = [f"python {platform.python_version()}", *(f"{name} {_version(name)}" for name in ("numpy", "torch", "onnx", "onnxscript"))]
    return [", ".join(versions), _onnxruntime()]


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "missing"


def _onnxruntime() -> str:
    try:
        ort = load_onnxruntime()
    except MissingDependencyError as error:
        return f"onnxruntime: {error}"
    return f"onnxruntime {ort.__version__}: {', '.join(ort.get_available_providers())}"


@pytest.fixture(scope="session", autouse=True)
def _torchlib_is_read_once() -> Iterator[None]:
    """onnxscript parses the sources of its translations of torch's operators for each traced graph, which takes a third of a second."""
    try:
        from torch.onnx._internal._lazy_import import onnxscript_apis  # type: ignore[attr-defined]  # that module imports the name without exporting it
    except ImportError:  # the tests of the runtime need no torch
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxscript_apis, "get_torchlib_ops", functools.cache(onnxscript_apis.get_torchlib_ops))
        yield


def make_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that ``make`` has filled, shared by all workers of pytest-xdist: the first that needs it makes it, the others wait."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tmp_path_factory.mktemp(name)
        make(folder)
        return folder
    shared = tmp_path_factory.getbasetemp().parent
    folder, done = shared / name, shared / f"{name}.done"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a worker that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scm-checkpoint of a small edm2 network with random but fixed weights: four classes, 8x8 RGB pixels."""
    return make_once(tmp_path_factory, "checkpoint", lambda folder: write_tiny_checkpoint(folder / "tiny.pt")) / "tiny.pt"


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with half as many layers, for exports whose network does not matter. Image size and classes are those of ``tiny_checkpoint``."""
    return make_once(tmp_path_factory, "small", lambda folder: write_tiny_checkpoint(folder / "tiny.pt", channel_mult=(1,))) / "tiny.pt"


def write_tiny_checkpoint(path: Path, *, seed: int = 0, diffusion: bool = False, **config: Any) -> Path:
    """Write such a checkpoint of a consistency model or, with ``diffusion``, a diffusion model. Returns ``path``."""
    import torch

    from scm_export.checkpoints import Checkpoint, SamplerSpec, save_checkpoint
    from scm_export.networks.edm2 import UNet, UNetConfig

    fields: dict[str, Any] = {"img_resolution": 8, "img_channels": 3, "label_dim": len(TINY_LABELS), "model_channels": 16, "channel_mult": (1, 2)}
    made = UNetConfig(**{**fields, "num_blocks": 1, "attn_resolutions": (), "channels_per_head": 16, "time_scale": 4.0, **config})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = UNet(made).state_dict()
    weights["out_gain"] = torch.ones(())  # it is initialized to 0, which makes F 0
    checkpoint = Checkpoint(
        family="edm2",
        config=dataclasses.asdict(made),
        sampler=SamplerSpec(solver="ddim" if diffusion else "consistency"),
        label_names=TINY_LABELS if made.label_dim else None,
        licence="Apache-2.0",
        weights=weights,
    )
    save_checkpoint(checkpoint, path)
    return path


@pytest.fixture(scope="session")
def tiny_guided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The verified bundle of a diffusion model guided by a smaller one without classes, and the two checkpoints."""
    from scm_export import export

    def make(folder: Path) -> None:
        teacher = write_tiny_checkpoint(folder / "teacher.pt", diffusion=True)
        guide = write_tiny_checkpoint(folder / "guide.pt", seed=1, diffusion=True, label_dim=0, channel_mult=(1,))
        export(teacher, folder / "guided.scm", guide=guide)

    folder = make_once(tmp_path_factory, "guided", make)
    return folder / "guided.scm", folder / "teacher.pt", folder / "guide.pt"


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The verified bundle of the tiny checkpoint. Shared by all tests: copy it before you modify it."""
    from scm_export import export

    return make_once(tmp_path_factory, "bundle", lambda folder: export(tiny_checkpoint, folder / "tiny.scm")) / "tiny.scm"


@pytest.fixture(scope="session")
def tiny(tiny_bundle: Path) -> Iterator[Generator]:
    """An open Generator on the tiny bundle."""
    with Generator(tiny_bundle) as generator:
        yield generator


@pytest.fixture(scope="module")
def slow_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose step takes minutes with ``toy_bundle.LONG_LOOP`` and ``LONG_OPERATOR``."""
    import toy_bundle  # imports onnx, which the runtime's own environment lacks

    return toy_bundle.write_text_bundle(tmp_path_factory.mktemp("slow") / "slow.scm", graphs={"step": toy_bundle.SLOW_STEP})


@pytest.fixture
def slow(slow_bundle: Path) -> Iterator[Generator]:
    """A Generator of ``slow_bundle``."""
    generator = Generator(slow_bundle, threads=1)
    yield generator
    generator.close()
