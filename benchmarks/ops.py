"""Are the native operators worth their library? Each kernel against its own function body and PyTorch eager; then whole steps.

    python benchmarks/ops.py [--device cpu|cuda] [--only operators|steps|convolutions] [--size XXS] [--size S] [--again]

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
from _common import Cells, interleaved
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
from scm_runtime.ort.options import MATMUL_PRECISION

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
    """Return every operator with the tensors of a step at batch 1 and with tensors of 64 MB; attention with the sizes of the networks."""
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
    found += norms(device, dtype)
    found += transformers(device, dtype)
    for length, heads in ((64, 12), (256, 9), (1024, 6)):
        qkv = torch.randn(1, length, 3 * 64 * heads, device=device, dtype=dtype)
        found.append(
            Case("CosineAttention", f"L {length}, {heads} heads", (qkv,), {"heads": heads, "eps": 1e-4}, lambda x, heads=heads: ops.cosine_attention(x, heads))
        )
    for length, keys, heads, width in ((1024, 1024, 8, 8), (256, 256, 2, 64), (1024, 77, 8, 64), (4096, 77, 8, 40), (1024, 1024, 8, 80)):
        q, k, v = (torch.randn(1, tokens, heads, width, device=device, dtype=dtype) for tokens in (length, keys, keys))
        attributes = {"scale": width**-0.5}
        found.append(Case("Attention", f"L {length}, {keys} keys, {heads} heads of {width}", (q, k, v), attributes, partial(ops.attention, **attributes)))
    attributes = {"scale": 0.125}
    for keys, mask_rows, about in ((77, 1, ""), (1024, 1024, ", a mask per query")):
        mask = torch.zeros(1, 1, mask_rows, keys, device=device, dtype=dtype)
        q, k = (torch.randn(1, tokens, 8, 64, device=device, dtype=dtype) for tokens in (1024, keys))
        inputs = (q, k, k.clone(), mask)
        found.append(Case("MaskedAttention", f"L 1024, {keys} keys, 8 heads of 64{about}", inputs, attributes, partial(ops.attention, **attributes)))
    return found


def norms(device: str, dtype: torch.dtype) -> list[Case]:
    """Return GroupNorm with the maps of U-Nets, LayerNorm and RMSNorm with the tokens of transformers."""

    def random(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=of)

    found = []
    for n, c, side in ((1, 64, 32), (8, 64, 32), (1, 128, 16), (1, 320, 64)):
        x, scale, bias = random(n, c, side, side), random(c, of=torch.float32), random(c, of=torch.float32)
        size, given = f"{n} x {c} x {side} x {side}", {"groups": 32, "eps": 1e-5}
        found += [
            Case("GroupNorm", size, (x, scale, bias), given, partial(ops.group_norm, groups=32, eps=1e-5)),
            Case("GroupNormSiLU", size, (x, scale, bias), given, partial(ops.group_norm_silu, groups=32, eps=1e-5)),
            Case("GroupNormModulateSiLU", size, (x, scale, bias, random(n, 2 * c)), given, partial(ops.group_norm_modulate_silu, groups=32, eps=1e-5)),
        ]
    for n, length, c in ((1, 1024, 64), (1, 1024, 512), (8, 1024, 512)):
        x, scale, bias = random(n, length, c), random(c, of=torch.float32), random(c, of=torch.float32)
        size = f"{n} x {length} x {c}"
        found += [
            Case("LayerNorm", size, (x, scale, bias), {"eps": 1e-5}, partial(ops.layer_norm, eps=1e-5)),
            Case("LayerNormModulate", size, (x, random(n, 1, c), random(n, 1, c)), {"eps": 1e-6}, partial(ops.layer_norm_modulate, eps=1e-6)),
            Case("RMSNorm", size, (x, scale), {"eps": 1e-5}, partial(ops.rms_norm, eps=1e-5)),
        ]
    return found


def transformers(device: str, dtype: torch.dtype) -> list[Case]:
    """Return the operators of transformer blocks, with the tensors of small models and of models in full size."""
    found = []
    for size, (channels, side, heads) in {"small SANA-Sprint": (512, 32, 16), "SANA-Sprint": (2240, 32, 70)}.items():
        q, k, v = torch.randn(3, 1, side * side, channels, device=device, dtype=dtype).unbind(0)
        found.append(
            Case(
                "ReLULinearAttention",
                size,
                (q, k, v),
                {"heads": heads, "eps": 1e-15},
                lambda q, k, v, heads=heads: ops.relu_linear_attention(q, k, v, heads),
            )
        )
        hidden = 5 * channels
        x, w, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((1, hidden, side, side), (hidden, 1, 3, 3), (hidden,)))
        found.append(Case("DepthwiseGLU", size, (x, w, b), {}, ops.depthwise_glu))
    for size, (tokens, channels) in {"small latent consistency model": (1024, 64), "latent consistency model": (4096, 320)}.items():
        x, b = torch.randn(1, tokens, 8 * channels, device=device, dtype=dtype), torch.randn(8 * channels, device=device, dtype=dtype)
        found.append(Case("GEGLU", size, (x, b), {}, ops.geglu))
    return found


def session(model: onnx.ModelProto | Path, device: str, *, native: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads would slow down the next candidate
    if native:
        library = find_library()
        if library is None:
            raise SystemExit("the native library is not installed: make ops")
        if device == "cpu":
            options.add_session_config_entry(MATMUL_PRECISION, "high")  # a Generator's default
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
    operator = ops.OPERATORS[f"scm::{name}"]
    attributes = {**case.attributes, **operator.size_attributes([x.shape for x in case.inputs])}
    inputs, outputs = [f"i{k}" for k in range(len(case.inputs))], [f"o{k}" for k in range(case.outputs)]
    types = [helper.np_dtype_to_tensor_dtype(np.dtype(str(x.dtype).removeprefix("torch."))) for x in case.inputs]
    graph = helper.make_graph(
        [helper.make_node(name, inputs, outputs, domain="scm", **attributes)],
        "operator",
        [helper.make_tensor_value_info(i, kind, list(x.shape)) for i, kind, x in zip(inputs, types, case.inputs, strict=True)],
        [onnx.ValueInfoProto(name=o) for o in outputs],
    )
    body = operator.function(OPSET, case.inputs[0].ndim, case.outputs)
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


def operators(device: str, *, again: bool) -> None:
    """Time each operator of ``cases``."""
    kept = Cells(f"ops-{device}", again=again)
    kept.measure("copy bandwidth, GB/s", by=partial(copy_bandwidth, device))
    for case in cases(device):
        kept.measure(f"{case.operator}, {case.size}", by=partial(time_operator, case, device, kept.get("copy bandwidth, GB/s")))


def time_operator(case: Case, device: str, bandwidth: float) -> dict[str, float]:
    """Return the milliseconds of each candidate, ratios to the kernel, and the kernel's bandwidth."""
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
    entry = {name: value["median_ms"] for name, value in found.items()}
    entry |= {f"x {name}": value["median_ms"] / kernel for name, value in found.items() if name != "kernel"}
    entry["GB/s"] = moved / kernel / 1e6
    if case.size == "64 MB":
        entry["share of copy bandwidth"] = entry["GB/s"] / bandwidth
    return entry


SIZES: dict[str, tuple[UNetConfig, int]] = {
    "XXS 32x32x4": (replace(PRESETS["XXS"], img_resolution=32, time_embedding="positional", modulation="scale-shift"), 20),
    "S 64x64x4": (replace(PRESETS["S"], time_embedding="positional", modulation="scale-shift"), 10),
}
"""Sizes of the steps: the network, and the number of runs of each candidate."""


def steps(device: str, sizes: list[str], *, again: bool) -> None:
    """Time whole steps."""
    kept = Cells(f"ops-steps-{device}", again=again, precision="high")
    for name in SIZES:
        if name.split()[0] in sizes:
            kept.measure(name, by=partial(time_steps, name, device))


def time_steps(size: str, device: str) -> dict[str, Any]:
    """Return the milliseconds of each candidate and ratios. "plain" is the result of torch.onnx.export if it traces through the operators."""
    config, repeats = SIZES[size]
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
            "PyTorch eager": torch_call(lambda *a: step(*a[:4], {"class_labels": a[4]}), (*state, labels), device),
        }
        found = interleaved(candidates, repeats=repeats, warmup=3)
    native = found["native"]
    return {
        **found,
        **{f"x {other}": found[other]["median_ms"] / native["median_ms"] for other in found if other != "native"},
        **{f"x {other}, of the minima": found[other]["min_ms"] / native["min_ms"] for other in found if other != "native"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", choices=["operators", "steps", "convolutions"])
    parser.add_argument("--size", choices=[name.split()[0] for name in SIZES], action="append")
    parser.add_argument("--again", action="store_true", help="measure again what was measured before")
    chosen = parser.parse_args()
    if chosen.only == "convolutions":
        convolutions(again=chosen.again)
        return
    if chosen.only != "steps":
        operators(chosen.device, again=chosen.again)
    if chosen.only != "operators":
        steps(chosen.device, chosen.size or ["XXS"], again=chosen.again)


if __name__ == "__main__":
    main()
