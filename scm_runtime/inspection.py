"""What ``scm-runtime inspect`` and ``scm-runtime smoke`` print."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scm_runtime.bundle import Conditioning, Manifest
from scm_runtime.generator import Generator
from scm_runtime.native import NativeOps

REPEATS = 5


def show_manifest(folder: Path, manifest: Manifest) -> None:
    """Print a manifest as tables."""
    console = Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in {
        "bundle": manifest.name,
        "folder": str(folder),
        "family": manifest.family,
        "parameters": f"{manifest.parameters / 1e6:.2f} M, stored in {manifest.weights_dtype}",
        "graphs": ", ".join(manifest.dtypes) + "".join(f", {domain} {version}" for domain, version in {"opset": manifest.opset, **manifest.ops}.items()),
        "state": f"float32 [N, {', '.join(map(str, manifest.sample.shape))}], sigma_d {manifest.sigma_data:g}",
        "output": f"{manifest.output.kind}, uint8 [N, {', '.join(map(str, manifest.output.shape))}]",
        **{f"times, {count} step{'s' * (count != '1')}": " → ".join(f"{t:.6g}" for t in times) for count, times in manifest.times.items()},
        **{item.name: _describe(item) for item in manifest.conditioning},
        "made by": f"{manifest.producer} from {manifest.source.file} (SHA-256 {manifest.source.sha256[:12]}…)",
        "licence": manifest.licence or "not stated",
        "verified": "no" if manifest.verification is None else _verified(manifest),
    }.items():
        facts.add_row(f"[bold]{name}[/]", escape(value))
    console.print(facts)
    files = Table("file", "bytes", "SHA-256", title="files, all present and unchanged")
    for file, entry in manifest.files.items():
        files.add_row(file, f"{entry.size:,}", entry.sha256[:16] + "…")
    console.print(files)


def _describe(item: Conditioning) -> str:
    if item.kind == "class":
        names = "" if item.label_names is None else ": " + ", ".join(item.label_names[:12]) + (", …" if len(item.label_names) > 12 else "")
        return f"{item.num_classes} classes{names}"
    return item.dtype + ("" if item.default is None else f", default {item.default:g}")


def _verified(manifest: Manifest) -> str:
    report = manifest.verification
    assert report is not None
    worst = max(report.cases, key=lambda case: case.max_abs / case.atol)
    return f"{len(report.cases)} cases against {report.reference}; worst max abs error {worst.max_abs:.2e} of {worst.atol:.2e} allowed"


def smoke_test(bundle: str, threads: int | None, *, native_ops: NativeOps = "auto", verify_integrity: bool = True) -> bool:
    """Run the checks of ``scm-runtime smoke`` and print them; returns whether all passed. Raises what Generator raises."""
    console = Console()
    start = time.perf_counter()
    generator = Generator(bundle, threads=threads, native_ops=native_ops, verify_integrity=verify_integrity)
    console.print(f"loaded in {(time.perf_counter() - start) * 1e3:.0f} ms", highlight=False)
    info = generator.info
    console.print(f"{info.dtype} on {info.device}, ONNX Runtime {info.onnxruntime} ({info.provider})", highlight=False)
    kernels = f"native kernels {info.native_ops_version}" if info.native_ops else f"function bodies, no native kernels: {info.native_ops_reason}"
    console.print(kernels, highlight=False, markup=False, soft_wrap=True)
    table = Table("steps", "finite", "deterministic", "independent of the batch", "batch 1, median", "batch 4, median")
    passed = True
    with generator:
        # Classes are given by seed, so that the same seed asks for the same class in every batch.
        for steps in sorted(int(count) for count in generator.manifest.times):
            guidance = 1.0 if any(item.name == "guidance_scale" for item in generator.manifest.conditioning) else None

            def latents(seeds: list[int], steps: int = steps, guidance: float | None = guidance) -> np.ndarray:
                return generator(seed=seeds, num_inference_steps=steps, guidance_scale=guidance, output_type="latent").array

            batch = latents([7, 8, 9, 10])
            alone, reordered = latents([9]), latents([10, 9, 7])
            pixels = [generator(seed=seeds, num_inference_steps=steps, guidance_scale=guidance, output_type="np").array for seeds in ([7, 9], [9])]
            checks = (
                bool(np.isfinite(batch).all()),
                bool(np.array_equal(batch, latents([7, 8, 9, 10]))),
                bool(
                    np.allclose(alone[0], batch[2], atol=1e-4) and np.allclose(reordered[1], batch[2], atol=1e-4) and np.array_equal(pixels[0][1], pixels[1][0])
                ),
            )
            passed &= all(checks)
            times = []
            for seeds in ([7], [7, 8, 9, 10]):
                runs = [generator(seed=seeds, num_inference_steps=steps, guidance_scale=guidance, output_type="np").timings.total for _ in range(REPEATS)]
                times.append(f"{statistics.median(runs) * 1e3:.1f} ms")
            table.add_row(str(steps), *("yes" if check else "[bold red]NO[/]" for check in checks), *times)
    console.print(table)
    return passed
