"""Prepare the models of one size. ``preparing.py`` starts it.

python -m _peers.prepare checkpoint,bundle,plain FOLDER SIZE --samples N --steps K --device cpu|cuda
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch
from torch.utils.flop_counter import FlopCounterMode

from _peers.case import INPUTS, LATENTS, REFERENCE, WITHOUT_DOUBLE, Case, Facts
from _peers.models import write_checkpoint
from _peers.sizes import SIZES
from scm_export import export, ops
from scm_export.checkpoints import load
from scm_export.example_inputs import example_conditioning
from scm_export.families import BuildOptions, build_model
from scm_export.graphs.trace import trace_step
from scm_export.model import Model
from scm_export.parametrisation import sample
from scm_export.writer import BundleWriter
from scm_runtime.bundle.manifest import Dtype

OPSET = 20
FIRST_SEED = 20261123
TOKENS = 64  # text length
HALF: dict[str, Dtype] = {"sana-sprint": "bf16"}  # on a GPU; other families use fp16


def checkpoint_of(folder: Path) -> Path:
    """Return the checkpoint that the first stage wrote."""
    return next(path for path in folder.iterdir() if path.suffix == ".pt" or path.name == "diffusers")


def make_bundle(size: str, folder: Path, device: str) -> None:
    """Export the bundle, without verification."""
    dtype: Dtype = "fp32" if device == "cpu" else HALF.get(SIZES[size].family, "fp16")
    export(checkpoint_of(folder), folder / "bundle.scm", dtype=dtype, latents=SIZES[size].family in LATENTS, verify=False, steps=())


def make_plain(size: str, folder: Path, samples: int, steps: int, device: str, made_with: str) -> None:
    """Write the plain export, the inputs, and PyTorch's result in float32."""
    checkpoint = checkpoint_of(folder)
    model = build_model(load(checkpoint), BuildOptions(latents=SIZES[size].family in LATENTS))
    reference, flop = draw_reference(model, folder, samples, steps)
    np.save(folder / REFERENCE, reference)
    facts = Facts(
        size=size,
        family=model.family,
        checkpoint=checkpoint.name,
        times=list(model.times[steps]),
        initial_scale=model.initial_scale,
        sigma_data=model.sigma_data,
        seeds=seeds(samples).tolist(),
        parameters=model.parameters,
        flop=flop / samples,
        made_with=made_with,
    )
    case = Case(folder, facts)
    case.plain("").parent.mkdir(exist_ok=True)
    for dtype in ("fp32",) if device == "cpu" else ("fp16",):
        model.store_as(dtype)
        model.compute_in(dtype)
        writer = BundleWriter(case.plain(dtype).parent)
        writer.graph(case.plain(dtype).name, trace_step(model, OPSET, operators=False))
        writer.close()
    if device == "cpu":
        write_without_double(case.plain("fp32"), case.plain(WITHOUT_DOUBLE))
    case.save()


def write_without_double(source: Path, target: Path) -> None:
    """Write the graph with all float64 computation in float32, beside its weights: OpenVINO's provider leaves it to its ONNX Runtime, which lacks kernels."""
    model = onnx.load(source, load_external_data=False)
    constants = list(model.graph.initializer)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.DOUBLE:
                attribute.i = onnx.TensorProto.FLOAT
            if node.op_type == "Constant" and attribute.name == "value":
                constants.append(attribute.t)
    for constant in constants:
        if constant.data_type == onnx.TensorProto.DOUBLE:  # small, so not external data
            constant.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(constant).astype(np.float32), constant.name))
    del model.graph.value_info[:]  # the types before
    onnx.save(model, target)


def seeds(samples: int) -> torch.Tensor:
    return torch.arange(FIRST_SEED, FIRST_SEED + samples)


def draw_reference(model: Model, folder: Path, samples: int, steps: int) -> tuple[np.ndarray[Any, Any], float]:
    """Write the inputs; return PyTorch's final state and the number of operations."""
    noises = [ops.philox_normal(seeds(samples), draw, model.sample_shape) for draw in range(steps + 1)]
    conditioning = {}
    for item in model.conditioning:
        value = example_conditioning(item, samples, {size: TOKENS for size in item.shape if isinstance(size, str)})
        # The pipelines take one guidance scale for the whole batch, and no mask.
        conditioning[item.name] = torch.full((samples,), float(item.default or 1)) if item.kind == "scalar" else value
        if item.kind == "mask":
            conditioning[item.name] = torch.ones_like(value)
    arrays = {f"noise_{k}": noise.numpy() for k, noise in enumerate(noises)} | {name: value.numpy() for name, value in conditioning.items()}
    np.savez(folder / INPUTS, **arrays)  # type: ignore[arg-type]  # NumPy's stub mistakes them for allow_pickle
    with FlopCounterMode(display=False) as counter:
        x = sample(model.step, noises, model.times[steps], model.initial_scale, conditioning)
    return x.numpy(), float(counter.get_total_flops())


@click.command()
@click.argument("stages")
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("size", type=click.Choice(list(SIZES)))
@click.option("--samples", type=int, required=True)
@click.option("--steps", type=int, required=True)
@click.option("--device", required=True)
@click.option("--made-with", required=True)
def main(stages: str, folder: Path, size: str, samples: int, steps: int, device: str, made_with: str) -> None:
    """Run some of the stages, separated by commas."""
    chosen = stages.split(",")
    if "checkpoint" in chosen:
        write_checkpoint(size, folder)
    if "bundle" in chosen:
        make_bundle(size, folder, device)
    if "plain" in chosen:
        make_plain(size, folder, samples, steps, device, made_with)


if __name__ == "__main__":
    main()
