"""What ``scm-runtime inspect`` and ``scm-runtime smoke`` print."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scm_runtime.bundle.manifest import Conditioning, Manifest, Source, Verification
from scm_runtime.generator import Generator
from scm_runtime.inputs.conditioning import PLACEHOLDER_SIZE, placeholder_conditioning
from scm_runtime.ort.native_ops import NativeOps
from scm_runtime.samples import Samples

REPEATS = 5
# How far a sample may be from itself in another batch, as the order of sums may depend on the batch: a share of the largest value, and levels of a pixel.
APART = {"fp32": (1e-4, 1), "fp16": (1e-2, 4), "bf16": (5e-2, 16)}


def show_manifest(folder: Path, manifest: Manifest, here: Collection[str]) -> None:
    """Print a manifest as tables. ``here`` are the files that have been compared with it."""
    console = Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    output = "uint8" if manifest.output.kind == "image" else "no decoder, float32"
    extras = [
        what for kind, what in (("encode", "an encoder"), ("preview", "a preview decoder")) if any(name.startswith(f"{kind}.") for name in manifest.files)
    ]
    for name, value in {
        "bundle": manifest.name,
        "folder": str(folder),
        "family": manifest.family,
        "parameters": f"{manifest.parameters / 1e6:.2f} M, stored in {manifest.weights_dtype}",
        "graphs": ", ".join(manifest.dtypes) + "".join(f", {domain} {version}" for domain, version in {"opset": manifest.opset, **manifest.ops}.items()),
        "state": f"float32 [N, {', '.join(map(str, manifest.sample.shape))}], sigma_d {manifest.sigma_data:g}",
        "output": f"{manifest.output.kind}, {output} [N, {', '.join(map(str, manifest.output.shape))}]",
        **({"also": ", ".join(extras)} if extras else {}),
        **{f"times, {count} step{'s' * (count != '1')}": _listed(times, manifest.time_unit) for count, times in manifest.times.items()},
        **{f"sampler {name}": f"{', '.join(map(str, counts))} steps" for name, counts in manifest.samplers.items()},
        **{item.name: _describe(item) for item in manifest.conditioning},
        "made by": f"{manifest.producer} from {manifest.source.file} (SHA-256 {manifest.source.sha256[:12]}…){_weights(manifest.source)}",
        "licence": manifest.licence or "not stated",
        "verified": "no" if manifest.verification is None else _verified(manifest.verification),
    }.items():
        facts.add_row(f"[bold]{name}[/]", escape(value))
    console.print(facts)
    whole = len(here) == len(manifest.files)
    files = Table("file", "bytes", "SHA-256", title="files, all present and unchanged" if whole else "files; those fetched so far are unchanged")
    if not whole:
        files.add_column("fetched")
    for file, entry in manifest.files.items():
        files.add_row(file, f"{entry.size:,}", entry.sha256[:16] + "…", *(() if whole else ("yes" if file in here else "no",)))
    console.print(files)


def _listed(times: Sequence[float], unit: str) -> str:
    return " → ".join(f"{t:.6g}" for t in times) + ("" if unit == "radians" else f" ({unit})")


def _describe(item: Conditioning) -> str:
    if item.kind == "class":
        names = "" if item.label_names is None else ": " + ", ".join(item.label_names[:12]) + (", …" if len(item.label_names) > 12 else "")
        return f"{item.num_classes} classes{names}"
    default = {"embedding": "to be given", "mask": "default all ones"}.get(item.kind, "to be given" if item.default is None else f"default {item.default:g}")
    return f"{item.kind}, {item.describe()}, {default}"


def _weights(source: Source) -> str:
    return "" if source.weights is None else f", weights {source.weights!r}"


def _verified(report: Verification) -> str:
    worst = max(report.cases, key=lambda case: case.max_abs / case.atol)
    devices = ", ".join(sorted({case.device for case in report.cases}))
    return f"{len(report.cases)} cases against {report.reference} on {devices}; worst max abs error {worst.max_abs:.2e} of {worst.atol:.2e} allowed"


# ----------------------------------------------------------------------------
# smoke


def smoke_test(
    bundle: str,
    threads: int | None,
    *,
    device: str = "auto",
    revision: str | None = None,
    native_ops: NativeOps = "auto",
    verify_integrity: bool = True,
) -> bool:
    """Run the checks of ``scm-runtime smoke`` and print them; returns whether all passed. Raises what Generator raises."""
    console = Console()
    start = time.perf_counter()
    generator = Generator(bundle, device=device, revision=revision, threads=threads, native_ops=native_ops, verify_integrity=verify_integrity)
    console.print(f"loaded in {(time.perf_counter() - start) * 1e3:.0f} ms", highlight=False)
    info = generator.info
    console.print(f"{info.dtype} on {info.device}, ONNX Runtime {info.onnxruntime} ({info.provider})", highlight=False)
    kernels = f"native kernels {info.native_ops_version}" if info.native_ops else f"function bodies, no native kernels: {info.native_ops_reason}"
    console.print(kernels, highlight=False, markup=False, soft_wrap=True)
    inputs = generator.manifest.conditioning
    if random := [f"{item.name} {item.describe()}" for item in inputs if item.kind == "embedding"]:
        free = sorted({size for item in inputs for size in item.shape if isinstance(size, str)})
        sizes = "".join(f", {PLACEHOLDER_SIZE} {size}" for size in free)
        said = f"random numbers stand in for {', '.join(random)}{sizes}: what is checked holds for any, but nothing is said of pictures from a text encoder"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    table = Table("steps", "finite", "deterministic", "independent of the batch", "batch 1, median", "batch 4, median")
    passed = True
    with generator:
        # Classes and embeddings are given by seed, so that the same seed asks for the same in every batch.
        for steps in sorted(int(count) for count in generator.manifest.times):

            def draw(seeds: list[int], output_type: Literal["np", "latent"], steps: int = steps) -> Samples:
                return generator(seed=seeds, num_inference_steps=steps, conditioning=placeholder_conditioning(inputs, seeds), output_type=output_type)

            batch = draw([7, 8, 9, 10], "latent").array
            alone, reordered = draw([9], "latent").array, draw([10, 9, 7], "latent").array
            pixels = [draw(seeds, "np").array.astype(np.float32) for seeds in ([7, 9], [9])]
            share, levels = APART[info.dtype]
            atol = share * max(1.0, float(np.abs(batch).max()))
            checks = (
                bool(np.isfinite(batch).all()),
                bool(np.array_equal(batch, draw([7, 8, 9, 10], "latent").array)),
                bool(np.allclose(alone[0], batch[2], rtol=0, atol=atol) and np.allclose(reordered[1], batch[2], rtol=0, atol=atol))
                and bool(np.abs(pixels[0][1] - pixels[1][0]).max() <= levels),
            )
            passed &= all(checks)
            medians = []
            for seeds in ([7], [7, 8, 9, 10]):
                runs = [draw(seeds, "np").timings.total for _ in range(REPEATS)]
                medians.append(f"{statistics.median(runs) * 1e3:.1f} ms")
            table.add_row(str(steps), *("yes" if check else "[bold red]NO[/]" for check in checks), *medians)
    console.print(table)
    return passed
