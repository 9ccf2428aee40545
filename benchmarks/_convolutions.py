"""Shapes of the 3x3 convolutions of the networks, and their times: the native kernel against ONNX Runtime's Conv, on one thread."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import numpy as np
import onnx
from _common import interleaved
from onnx import TensorProto, helper

from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.ort.native_ops import find_library
from scm_runtime.ort.options import MATMUL_PRECISION

ort = load_onnxruntime()

OPSET = 20
Shape = tuple[int, int, int, int]
"""Batch, side of the map, input and output channels."""

EDM2: dict[str, list[Shape]] = {
    "digits": [(1, 16, 32, 32), (1, 8, 64, 64), (1, 4, 64, 64)],
    "XXS": [(1, 32, 64, 64), (1, 16, 128, 128), (1, 8, 192, 192), (1, 4, 256, 256), (8, 32, 64, 64), (8, 8, 192, 192), (8, 4, 256, 256)],
    "S": [(1, 64, 192, 192), (1, 32, 384, 384), (1, 16, 576, 576), (1, 8, 768, 768)],
    "XXL": [(1, 64, 448, 448), (1, 32, 896, 896), (1, 16, 1344, 1344), (1, 8, 1792, 1792)],
}
DIFFUSERS: dict[str, list[Shape]] = {
    "consistency model": [(1, 64, 64, 64), (1, 32, 128, 128), (1, 16, 192, 192)],
    "latent consistency model": [(1, 32, 64, 64), (1, 16, 128, 128), (1, 8, 256, 256)],
}


def _model(shape: Shape, weight: np.ndarray[Any, Any], domain: str) -> bytes:
    """A model of one convolution; its input and output are channels last in ``scm.channels_last``, else channels first."""
    batch, side, inputs, outputs = shape
    last = domain == "scm.channels_last"
    sizes = [[batch, side, side, channels] if last else [batch, channels, side, side] for channels in (inputs, outputs)]
    node = helper.make_node("Conv3x3" if last else "Conv", ["x", "w", "b"][: 2 if last else 3], ["y"], domain=domain)
    if not last:
        node.attribute.append(helper.make_attribute("pads", [1] * 4))
    graph = helper.make_graph(
        [node],
        "convolution",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes[0])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, sizes[1])],
        [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(np.zeros(outputs, np.float32), "b")][: 1 if last else 2],
    )
    opsets = [helper.make_opsetid("", OPSET)] + [helper.make_opsetid(domain, 1)] * bool(domain)
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def _run(shape: Shape, weight: np.ndarray[Any, Any], domain: str) -> partial[Any]:
    """A call of the convolution with bound input and output."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if domain:
        library = find_library()
        if library is None:
            sys.exit("the native library is missing: run make ops")
        options.add_session_config_entry(MATMUL_PRECISION, "high")
        options.register_custom_ops_library(str(library.path))
    session = ort.InferenceSession(_model(shape, weight, domain), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for bind, argument in ((binding.bind_ortvalue_input, session.get_inputs()[0]), (binding.bind_ortvalue_output, session.get_outputs()[0])):
        value = np.random.default_rng(0).standard_normal(argument.shape).astype(np.float32)
        bind(argument.name, ort.OrtValue.ortvalue_from_numpy(value))
    return partial(session.run_with_iobinding, binding)


def convolutions() -> dict[str, Any]:
    """Time each shape. SCM_OPS_MAX_ISA selects the kernels: "avx2" and "avx512" those in float32, none the processor's best.

    "x" is the time of ONNX Runtime's Conv, which is channels first, divided by that of the kernel: "last" for channels-last maps, "first" for
    channels-first maps.
    """
    figures: dict[str, Any] = {}
    for network, shapes in {**EDM2, **DIFFUSERS}.items():
        layouts = {"last": "scm.channels_last"} if network in EDM2 else {"first": "scm.channels_first"}
        for shape in shapes:
            batch, side, inputs, outputs = shape
            products = 9 * batch * side * side * inputs * outputs
            weight = (np.random.default_rng(1).standard_normal((outputs, inputs, 3, 3)) / np.sqrt(9 * inputs)).astype(np.float32)
            candidates = {name: _run(shape, weight, domain) for name, domain in {**layouts, "ONNX Runtime": ""}.items()}
            found = interleaved(candidates, repeats=max(5, min(50, int(2e9 / products))))
            name = f"{network}, batch {batch}, {side}x{side}, {inputs} to {outputs}"
            figures[name] = {key: value["median_ms"] for key, value in found.items()}
            figures[name] |= {f"x {key}": found["ONNX Runtime"]["min_ms"] / found[key]["min_ms"] for key in layouts}
            print(name, figures[name], flush=True)
    return figures
