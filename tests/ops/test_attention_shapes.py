"""Attention and MaskedAttention over random shapes: CPU kernel, function body and torch agree, also on NaN and infinity, alone and in any batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from scm_export import ops
from scm_export.graphs.build import ir_version
from scm_export.ops import OPERATORS
from scm_export.verification.tolerances import OP_TOLERANCE
from scm_runtime.bundle.manifest import OPS_DOMAIN, OPS_VERSION
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from support import native_library

onnxruntime = load_onnxruntime()

OPSET = 20
Inputs = dict[str, NDArray[Any]]


def session(inputs: Inputs, scale: float, *, native: bool) -> Any:
    """Open a graph of one node, in which every size but that of the heads is dynamic."""
    operator = OPERATORS["scm::MaskedAttention" if "mask" in inputs else "scm::Attention"]
    kind = helper.np_dtype_to_tensor_dtype(inputs["q"].dtype)
    sizes = {"q": ["n", "l", *inputs["q"].shape[2:]], "k": ["n", "s", *inputs["k"].shape[2:]], "v": ["n", "s", *inputs["v"].shape[2:]]}
    given = [helper.make_tensor_value_info(name, kind, sizes.get(name)) for name in inputs]
    attributes = {"scale": scale, **operator.size_attributes([x.shape for x in inputs.values()])}
    node = helper.make_node(operator.name, list(inputs), ["y"], domain=OPS_DOMAIN)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    model = helper.make_model(
        helper.make_graph([node], "attention", given, [helper.make_tensor_value_info("y", kind, None)]),
        functions=[operator.function(OPSET, 4)],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(OPS_DOMAIN, OPS_VERSION)],
        ir_version=ir_version(OPSET),
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if native:
        options.register_custom_ops_library(str(native_library()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def random_inputs(rng: np.random.Generator, dtype: str) -> Inputs:
    samples, queries, keys = (int(rng.integers(0, limit)) for limit in (6, 71, 151))
    key_heads, group = (int(rng.integers(1, limit)) for limit in (4, 4))
    size, width = (int(rng.integers(1, 201)) for _ in range(2))
    shapes = {"q": (samples, queries, key_heads * group, size), "k": (samples, keys, key_heads, size), "v": (samples, keys, key_heads, width)}
    inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    if rng.random() < 0.6:
        full = (samples, key_heads * group, queries)
        mask = rng.standard_normal((*(axis if rng.random() < 0.5 else 1 for axis in full), keys))
        mask[mask < -0.5] = -math.inf
        inputs["mask"] = mask
    if rng.random() < 0.3:  # not in the mask, of which torch takes all that is -infinity for hidden
        x = inputs["qkv"[int(rng.integers(3))]]
        if x.size:
            x.flat[int(rng.integers(x.size))] = rng.choice([math.nan, math.inf])
    return {name: x.astype(dtype) for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_kernel_body_and_torch_agree(dtype: str) -> None:
    atol, rtol = OP_TOLERANCE[dtype]
    rng = np.random.default_rng(7)
    for number in range(40):
        inputs = random_inputs(rng, dtype)
        scale = 1 / math.sqrt(inputs["q"].shape[3])
        message = f"case {number}: " + ", ".join(f"{name} {x.shape}" for name, x in inputs.items())
        kernel, body = (session(inputs, scale, native=native) for native in (True, False))
        found = kernel.run(None, inputs)[0]
        np.testing.assert_allclose(found.astype(np.float32), body.run(None, inputs)[0].astype(np.float32), atol=atol, rtol=rtol, err_msg=message)
        if all(np.isfinite(inputs[name]).all() for name in "qkv"):
            expected = ops.attention(*(torch.from_numpy(x.astype(np.float32)) for x in inputs.values()), scale=scale).numpy()
            np.testing.assert_allclose(found.astype(np.float32), expected, atol=atol, rtol=rtol, err_msg=message)
        for sample in range(len(found)):
            alone = {name: x[sample : sample + 1] if len(x) > 1 or name != "mask" else x for name, x in inputs.items()}
            np.testing.assert_array_equal(kernel.run(None, alone)[0], found[sample : sample + 1], err_msg=f"{message}, sample {sample} alone")
