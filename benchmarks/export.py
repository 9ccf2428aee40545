"""What does an export cost, verification included? Seconds and peak memory by model size; and do the largest bundles open and run on a CPU?

    python benchmarks/export.py                      XXS
    python benchmarks/export.py S                    two minutes, 3 GB of memory
    python benchmarks/export.py XXL SANA-Sprint      1.5 and 1.6 billion parameters: most of an hour, 14 GB of memory, 15 GB of disk (TMPDIR)

The weights are random. Each checkpoint is written, exported and sampled in separate processes, whose peak memory is ``ru_maxrss``. Rows of models that are
not measured stay in the results.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

# Nothing large is imported here: on Linux, the peak of a process includes the size of its parent when it was started.
import click
from _common import AGAIN, Cells

DTYPES = {"XXS": ("fp32",), "S": ("fp32",), "XXL": ("fp32", "fp16"), "SANA-Sprint": ("bf16",)}
USUAL = ("XXS",)
TOKENS = 300  # text length

T = TypeVar("T")


def write_checkpoint(name: str, folder: Path) -> Path:
    """Write a model with random weights, with at most one copy of them in memory."""
    import torch

    if name == "SANA-Sprint":
        from _sana_sprint import full_size_folder

        path = folder / "sana-sprint"
        full_size_folder(path)
        return path
    from scm_export.checkpoints import Checkpoint, SamplerSpec, save_checkpoint
    from scm_export.networks.edm2 import PRESETS, UNet

    torch.manual_seed(0)
    network = UNet(PRESETS[name])
    torch.nn.init.ones_(network.out_gain)
    path = folder / f"{name}.pt"
    save_checkpoint(Checkpoint(family="edm2", config=asdict(PRESETS[name]), sampler=SamplerSpec(), weights=network.state_dict()), path)
    return path


def export_bundle(checkpoint: Path, bundle: Path, dtype: str) -> dict[str, Any]:
    """Export, and return time and memory: seconds by stage, with the peak of memory up to the end of each."""
    start = time.perf_counter()
    from scm_export import export

    stages: list[dict[str, Any]] = []
    name, began = "importing", start

    def progress(stage: str) -> None:
        nonlocal name, began
        now = time.perf_counter()
        stages.append({"stage": name, "seconds": round(now - began, 2), "peak_bytes": peak()})
        name, began = stage, now

    exported = export(checkpoint, bundle, dtype=dtype, latents=checkpoint.is_dir(), progress=progress)  # type: ignore[arg-type]  # one of DTYPES
    progress("")
    weights = 4 * exported.manifest.parameters
    return {
        "parameters": exported.manifest.parameters,
        "fp32_weights_bytes": weights,
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak(),
        "peak / fp32 weights": peak() / weights,
        "bundle_bytes": sum(path.stat().st_size for path in bundle.iterdir()),
        "cases_verified": len(exported.manifest.verification.cases) if exported.manifest.verification else 0,
        "stages": stages,
    }


def run_two_steps(bundle: Path) -> dict[str, Any]:
    """Open the fp32 graphs of a bundle and generate the latents of one sample in two steps."""
    import numpy as np

    from scm_runtime import Generator

    start = time.perf_counter()
    with Generator(bundle, verify_integrity=False) as generate:
        loaded = time.perf_counter()
        rng = np.random.default_rng(0)
        conditioning: dict[str, Any] = {}
        for item in generate.manifest.conditioning:
            if item.kind == "class":
                conditioning[item.name] = 207
            elif item.kind == "embedding":
                shape = [TOKENS if isinstance(size, str) else size for size in item.shape]
                conditioning[item.name] = rng.standard_normal((1, *shape), np.float32)
        latents = generate(**conditioning, seed=0, num_inference_steps=2, output_type="latent").array
        ran = time.perf_counter()
        native_ops = generate.info.native_ops
    return {
        "load_seconds": loaded - start,
        "two_steps_seconds": ran - loaded,
        "native_ops": native_ops,
        "peak_bytes": peak(),
        "finite": bool(np.isfinite(latents).all()),
        "latents_std": float(latents.std()),
    }


def peak() -> int:
    """Return the peak memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_a_process(function: Callable[..., T], *args: object) -> T:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure(checkpoint: Path, dtype: str) -> dict[str, Any]:
    """Return the row of one model and dtype."""
    with tempfile.TemporaryDirectory() as out:
        bundle = Path(out) / "bundle.scm"
        row = in_a_process(export_bundle, checkpoint, bundle, dtype)
        return {**row, "run": in_a_process(run_two_steps, bundle)}


@click.command(help=__doc__.split("\n")[0])
@click.argument("names", nargs=-1, type=click.Choice(list(DTYPES)))
@AGAIN
def main(names: tuple[str, ...], again: bool) -> None:
    cells = Cells("export", again=again)
    for name in names or USUAL:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            new = not all(cells.is_measured(f"{name} {dtype}") for dtype in DTYPES[name])
            checkpoint = in_a_process(write_checkpoint, name, path) if new else path
            for dtype in DTYPES[name]:
                cells.measure(f"{name} {dtype}", by=partial(measure, checkpoint, dtype))


if __name__ == "__main__":
    main()
