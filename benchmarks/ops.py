"""Are the native operators worth their library? Each kernel against its own function body and PyTorch eager; then whole steps.

    python benchmarks/ops.py [--device cpu|cuda] [--only operators|steps|convolutions] [--size XXS] [--size S]

Operators: the same single-node graph runs in ONNX Runtime with the library (kernel) and without (body); PyTorch runs the reference function.
Bandwidth counts inputs and outputs once, relative to the bandwidth of copying a tensor of 256 MB. Steps: EDM2 with sCM's changes and random
weights, batch 1: the exported step with the library and without, a plain export of the same network without scm operators, PyTorch eager. By
default only XXS; S takes minutes. Rows that are not measured stay in the results. All candidates are interleaved; ratios are of medians, and
"x" is the time of the other candidate divided by that of the library. Convolutions, by name only: the layers' shapes against ONNX Runtime's Conv.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from _common import interleaved, save_and_print, stored_figures
from _convolutions import convolutions
from _peers.models import random_checkpoint
from onnx import helper

from scm_export import ops
from scm_export.checkpoints import load_checkpoint
from scm_export.families import build_model
from scm_export.graphs.trace import trace_step
from scm_export.networks.edm2 import PRESETS, UNetConfig
from scm_export.writer import BundleWriter
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.ort.native_ops import find_library

ort = load_onnxruntime()

OPSET = 20
COPY_BYTES = 256 << 20
BIG = 64 << 20  # bytes of one tensor: far larger than any cache


@dataclass(frozen=True)
class Case:
    """One operator on inputs of one size: inputs and attributes of the node, and the PyTorch function."""

    operator: str
    size: str
    inputs: tuple[torch.Tensor, ...]
    attributes: dict[str, Any]
    eager: Callable[..., object]
    outputs: int = 1


def cases(device: str) -> list[Case]:
    """Return every operator with the tensors of a step at batch 1 and with tensors of 64 MB; attention with the lengths of the networks."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    found = []
    for size, (n, side, c) in {"step": (1, 32, 128), "64 MB": (1, 256, BIG // (256 * 256 * dtype.itemsize))}.items():

        def full(channels: int, n: int = n, side: int = side) -> torch.Tensor:
            return torch.randn(n, side, side, channels, device=device, dtype=dtype)

        def rows(channels: int, n: int = n) -> torch.Tensor:
            return torch.randn(n, channels, device=device, dtype=dtype)

        x, image, f32 = full(c), full(4).permute(0, 3, 1, 2).contiguous(), torch.float32
        state, t = torch.randn(n, c, side, side, device=device), torch.full((n,), 0.5, device=device)
        found += [
            Case("PixelNorm", size, (x,), {"eps": 1e-4}, ops.pixel_norm),
            Case("PixelNorm, activated", size, (x,), {"eps": 1e-4}, ops.pixel_norm_silu, outputs=2),
            Case("MPSiLU", size, (x,), {}, ops.mp_silu),
            Case("MPSum", size, (x, full(c)), {"t": 0.3, "clip": 256.0}, lambda a, b: ops.mp_sum(a, b, 0.3, 256.0)),
            Case("MPSum, activated", size, (x, full(c)), {"t": 0.3, "clip": 256.0}, lambda a, b: ops.mp_sum_silu(a, b, 0.3, 256.0), outputs=2),
            Case("MPCat, activated", size, (full(c // 2), full(c // 2)), {"t": 0.5}, ops.mp_cat_silu, outputs=2),
            Case("ModulateSiLU", size, (x, rows(c)), {}, ops.modulate_silu),
            Case("NormModulateSiLU", size, (x, rows(2 * c)), {"eps": 1e-4}, ops.norm_modulate_silu),
            Case(
                "ConsistencyStep",
                size,
                (state, state.to(dtype), state.clone(), t, t.clone()),
                {"sigma_data": 0.5},
                partial(ops.consistency_step, sigma_data=0.5),
            ),
            Case("ToImage", size, (image,), {"scale": 127.5, "offset": 127.5}, lambda x: ops.to_image(x, 127.5, 127.5)),
        ]
        seeds, scalar = torch.arange(n, device=device), torch.ones((), device=device, dtype=f32)
        shape = [4, side, side] if size == "step" else [4, 512, 512]
        draw = torch.tensor(0, device=device)
        found.append(
            Case(
                "PhiloxNormal",
                "step" if size == "step" else "4 MB",
                (seeds, draw, scalar),
                {"shape": shape},
                lambda s, d, c, shape=shape: ops.philox_normal(s, 0, shape),
            )
        )
    for length, heads in ((64, 12), (256, 9), (1024, 6)):
        qkv = torch.randn(1, length, 3 * 64 * heads, device=device, dtype=dtype)
        found.append(
            Case("CosineAttention", f"L {length}, {heads} heads", (qkv,), {"heads": heads, "eps": 1e-4}, lambda x, heads=heads: ops.cosine_attention(x, heads))
        )
    return found


def session(model: onnx.ModelProto | Path, device: str, *, native: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads would slow down the next candidate
    if native:
        library = find_library()
        if library is None:
            raise SystemExit("the native library is not installed: make ops")
        options.register_custom_ops_library(str(library.path))
    data = str(model) if isinstance(model, Path) else model.SerializeToString()
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    opened = ort.InferenceSession(data, options, providers=[provider])
    if opened.get_providers()[0] != provider:
        raise SystemExit(f"ONNX Runtime opened the session on {opened.get_providers()[0]}, not on {provider}")
    return opened


def bound(run: Any, inputs: dict[str, torch.Tensor], device: str) -> Callable[[], None]:
    """Return a run of the session with inputs on its device. Outputs are allocated there too, as inside a larger graph."""
    binding = run.io_binding()
    for name, tensor in inputs.items():
        element = helper.np_dtype_to_tensor_dtype(np.dtype(str(tensor.dtype).removeprefix("torch.")))
        binding.bind_input(name, device, 0, element, tuple(tensor.shape), tensor.data_ptr())
    for output in run.get_outputs():
        binding.bind_output(output.name, device, 0)

    def once() -> None:
        run.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return once


def node_model(case: Case) -> onnx.ModelProto:
    """Return a model with a single node of the operator, and its function body."""
    name = case.operator.split(",")[0]
    inputs, outputs = [f"i{k}" for k in range(len(case.inputs))], [f"o{k}" for k in range(case.outputs)]
    types = [helper.np_dtype_to_tensor_dtype(np.dtype(str(x.dtype).removeprefix("torch."))) for x in case.inputs]
    graph = helper.make_graph(
        [helper.make_node(name, inputs, outputs, domain="scm", **case.attributes)],
        "operator",
        [helper.make_tensor_value_info(i, kind, list(x.shape)) for i, kind, x in zip(inputs, types, case.inputs, strict=True)],
        [onnx.ValueInfoProto(name=o) for o in outputs],
    )
    body = ops.OPERATORS[f"scm::{name}"].function(OPSET, case.inputs[0].ndim, case.outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("scm", 1)], ir_version=9, functions=[body])


def torch_call(run: Callable[..., object], inputs: tuple[torch.Tensor, ...], device: str) -> Callable[[], None]:
    @torch.inference_mode()
    def once() -> None:
        run(*inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    return once


def copy_bandwidth(device: str) -> float:
    """Return the bandwidth of copying a large tensor in GB/s, bytes read and written."""
    a = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        b.copy_(a)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * COPY_BYTES / sorted(times)[len(times) // 2] / 1e9


def operators(device: str) -> dict[str, Any]:
    bandwidth = copy_bandwidth(device)
    figures: dict[str, Any] = {"copy bandwidth, GB/s": bandwidth}
    for case in cases(device):
        model = node_model(case)
        named = {f"i{k}": x for k, x in enumerate(case.inputs)}
        candidates = {
            "kernel": bound(session(model, device, native=True), named, device),
            "body": bound(session(model, device, native=False), named, device),
            "PyTorch eager": torch_call(case.eager, case.inputs, device),
        }
        if case.operator == "CosineAttention":
            n, length, _ = case.inputs[0].shape
            q, k, v = case.inputs[0].reshape(n, length, 3, -1, 64).permute(2, 0, 3, 1, 4).contiguous().unbind(0)
            candidates["PyTorch scaled_dot_product_attention"] = torch_call(torch.nn.functional.scaled_dot_product_attention, (q, k, v), device)
        found = interleaved(candidates, repeats=10 if case.size == "64 MB" else 50, warmup=3)
        kernel = found["kernel"]["median_ms"]
        with torch.inference_mode():
            results = case.eager(*case.inputs)
        tensors = [*case.inputs, *(results if isinstance(results, tuple) else (results,))]
        moved = sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))
        entry: dict[str, Any] = {name: value["median_ms"] for name, value in found.items()}
        entry |= {f"x {name}": value["median_ms"] / kernel for name, value in found.items() if name != "kernel"}
        entry["GB/s"] = moved / kernel / 1e6
        if case.size == "64 MB":
            entry["share of copy bandwidth"] = entry["GB/s"] / bandwidth
        figures[f"{case.operator}, {case.size}"] = entry
        print(f"{case.operator}, {case.size}", entry, flush=True)
    return figures


SIZES: dict[str, tuple[UNetConfig, int]] = {
    "XXS 32x32x4": (replace(PRESETS["XXS"], img_resolution=32, time_embedding="positional", modulation="scale-shift"), 20),
    "S 64x64x4": (replace(PRESETS["S"], time_embedding="positional", modulation="scale-shift"), 10),
}
"""Sizes of the steps: the network, and the number of runs of each candidate."""


def steps(device: str, sizes: list[str]) -> dict[str, Any]:
    """Time whole steps. "plain" is the result of torch.onnx.export if it traces through the operators."""
    figures = stored_figures(f"ops-steps-{device}")
    for name, (config, repeats) in SIZES.items():
        if name.split()[0] not in sizes:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            model = build_model(load_checkpoint(random_checkpoint(config, folder / "model.pt")))
            writer = BundleWriter(folder)
            writer.graph("scm.onnx", trace_step(model, OPSET))
            writer.graph("plain.onnx", trace_step(model, OPSET, operators=False))
            writer.close()
            torch.manual_seed(0)
            x, t = torch.randn(1, *model.sample_shape, device=device), torch.full((1,), 1.5, device=device)
            inputs = {"x": x, "t": t, "t_next": t - 0.5, "noise": x.flip(-1).contiguous(), "class_labels": torch.tensor([3], device=device)}
            step = model.step.to(device)
            *state, labels = inputs.values()
            candidates = {
                "native": bound(session(folder / "scm.onnx", device, native=True), inputs, device),
                "bodies": bound(session(folder / "scm.onnx", device, native=False), inputs, device),
                "plain": bound(session(folder / "plain.onnx", device, native=False), inputs, device),
                "PyTorch eager": torch_call(lambda *a, step=step: step(*a[:4], {"class_labels": a[4]}), (*state, labels), device),
            }
            found = interleaved(candidates, repeats=repeats, warmup=3)
        native = found["native"]
        figures[name] = {
            **found,
            **{f"x {other}": found[other]["median_ms"] / native["median_ms"] for other in found if other != "native"},
            **{f"x {other}, of the minima": found[other]["min_ms"] / native["min_ms"] for other in found if other != "native"},
        }
        print(name, figures[name], flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", choices=["operators", "steps", "convolutions"])
    parser.add_argument("--size", choices=[name.split()[0] for name in SIZES], action="append")
    chosen = parser.parse_args()
    if chosen.only == "convolutions":
        save_and_print("ops-convolutions-cpu", convolutions())
        return
    if chosen.only != "steps":
        save_and_print(f"ops-{chosen.device}", operators(chosen.device))
    if chosen.only != "operators":
        save_and_print(f"ops-steps-{chosen.device}", steps(chosen.device, chosen.size or ["XXS"]))


if __name__ == "__main__":
    main()
