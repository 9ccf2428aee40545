"""The whole story of an export: load, build, trace, compose, write, verify."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from scm_export.checkpoints import load_checkpoint
from scm_export.families import build_model
from scm_export.graphs import build_decode, build_noise, compose_sample
from scm_export.model import Model
from scm_export.trace import trace_step
from scm_export.verify import draw_references, verify_bundle
from scm_export.writer import BundleWriter, check_destination, new_bundle
from scm_runtime import __version__
from scm_runtime.bundle import SCHEMA_VERSION, Manifest, OutputSpec, SampleSpec, Source, sha256
from scm_runtime.errors import InvalidArgumentError

OPSETS = range(18, 24)
DEFAULT_OPSET = 20

# The dtypes a bundle's graphs compute in, by the dtype its weights are stored in.
GRAPH_DTYPES: dict[str, tuple[Literal["fp32", "fp16"], ...]] = {"fp32": ("fp32",), "fp16": ("fp16", "fp32")}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """A finished bundle."""

    path: Path
    manifest: Manifest


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    dtype: Literal["fp32", "fp16"] = "fp32",
    steps: Sequence[int] = (1, 2),
    opset: int = DEFAULT_OPSET,
    force: bool = False,
    verify: bool = True,
    atol: float | None = None,
    progress: Progress = lambda stage: None,
) -> Exported:
    """Turn a checkpoint into a bundle.

    Args:
        checkpoint: a scm-checkpoint, ``.pt`` or ``.safetensors``. No code from it is run.
        out: the bundle's folder; by default the checkpoint's path with the ending ``.scm``.
        dtype: of the stored weights. fp16 gives an fp16 and an fp32 graph over the same half weights.
        steps: step counts to compose whole samplers for, ``sample-K``; each must have times in the checkpoint. May be empty.
        opset: ONNX operator set, 18 to 23.
        force: replace an existing bundle.
        verify: compare the bundle's samples with PyTorch's, at batch 1 and 3, with every step count the model has times for.
        atol: largest absolute difference allowed, in the state's scale; None for the table in ``tolerances.py``.
        progress: called with the name of each stage as it begins.

    Returns:
        The bundle's path and manifest.

    Raises:
        CheckpointError: the checkpoint cannot be read, or does not fit its family.
        InvalidArgumentError: an option is out of range.
        OutputError: the bundle cannot be written, or exists and force is False.
        VerificationError: the bundle is over tolerance; nothing is left at ``out``.
        ExportError: torch cannot translate the network.
    """
    source = Path(checkpoint)
    destination = source.with_suffix(".scm") if out is None else Path(out)
    check_options(dtype, opset, atol)
    check_destination(destination, force=force)
    progress("reading the checkpoint")
    model = build_model(load_checkpoint(source))
    return export_model(
        model,
        destination,
        source=Source(file=source.name, sha256=sha256(source)),
        dtype=dtype,
        steps=steps,
        opset=opset,
        force=force,
        verify=verify,
        atol=atol,
        progress=progress,
    )


def export_model(
    model: Model,
    destination: Path,
    *,
    source: Source,
    dtype: Literal["fp32", "fp16"] = "fp32",
    steps: Sequence[int] = (1, 2),
    opset: int = DEFAULT_OPSET,
    force: bool = False,
    verify: bool = True,
    atol: float | None = None,
    progress: Progress = lambda stage: None,
) -> Exported:
    """Write and verify the bundle of a model; see :func:`export`. The model's weights are rounded to ``dtype``."""
    check_options(dtype, opset, atol)
    if unknown := sorted(set(steps) - set(model.times)):
        raise InvalidArgumentError(f"steps must be among {sorted(model.times)}, the counts this checkpoint has times for; got {unknown}")
    references = draw_references(model, sorted(model.times), progress) if verify else []
    with new_bundle(destination, force=force) as writer:
        _write_graphs(writer, model, dtype, sorted(set(steps)), opset, progress)
        progress("writing")
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=destination.stem,
            producer=f"scm-export {__version__}",
            family=model.family,
            licence=model.licence,
            source=source,
            parameters=model.parameters,
            sample=SampleSpec(shape=model.sample_shape),
            output=OutputSpec(kind="image", shape=(*model.sample_shape[1:], model.sample_shape[0])),
            sigma_data=model.sigma_data,
            initial_scale=model.initial_scale,
            times={str(count): times for count, times in sorted(model.times.items())},
            conditioning=model.conditioning,
            dtypes=GRAPH_DTYPES[dtype],
            weights_dtype=dtype,
            opset=opset,
            ops={},
            composed_steps=tuple(sorted(set(steps))),
            files=writer.close(),
        )
        writer.manifest(manifest)
        if verify:
            verification = verify_bundle(writer.folder, manifest, references, atol, progress)
            manifest = msgspec.structs.replace(manifest, verification=verification)
            writer.manifest(manifest)
    return Exported(destination, manifest)


def _write_graphs(writer: BundleWriter, model: Model, dtype: str, steps: Sequence[int], opset: int, progress: Progress) -> None:
    noise = writer.graph("noise.onnx", build_noise(model.sample_shape, opset))
    model.store_as(dtype)
    for compute_dtype in GRAPH_DTYPES[dtype]:
        progress(f"tracing in {compute_dtype}")
        model.compute_in(compute_dtype)
        step = writer.graph(f"step.{compute_dtype}.onnx", trace_step(model, opset))
        decode = writer.graph(f"decode.{compute_dtype}.onnx", build_decode(model.sample_shape, model.decoder, opset))
        for count in steps:
            writer.proto(f"sample-{count}.{compute_dtype}.onnx", compose_sample(model, count, noise, step, decode))


def check_options(dtype: str, opset: int, atol: float | None) -> None:
    """Refuse options out of range; raises InvalidArgumentError."""
    if dtype not in GRAPH_DTYPES:
        raise InvalidArgumentError(f"dtype must be one of {', '.join(GRAPH_DTYPES)}, got {dtype!r}")
    if opset not in OPSETS:
        raise InvalidArgumentError(f"opset must be from {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    if atol is not None and not atol > 0:
        raise InvalidArgumentError(f"atol must be above 0, got {atol}")
