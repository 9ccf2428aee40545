"""The convolutions in float32, for each instruction set that the processor has, against PyTorch in float64.

The library reads SCM_OPS_MAX_ISA once in a process, so the kernels run in a process of their own.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from support import CONVOLUTION_ISAS, native_library, run_python

CASES, MAX_PRODUCTS = 30, 1e7
MAX_ERROR = 5e-5  # relative to the outputs' root mean square
BATCHES, SIZES, CHANNELS = (0, 6), (1, 71), (1, 201)

RUN_MODELS = """
import sys
from pathlib import Path
import numpy as np
from scm_runtime.common.load_onnxruntime import load_onnxruntime
onnxruntime = load_onnxruntime()
library, folder = sys.argv[1], Path(sys.argv[2])
for path in sorted(folder.glob("*.onnx")):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("scm.float32_matmul_precision", "high")
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = dict(np.load(path.with_suffix(".npz")))
    whole = session.run(None, inputs)[0]
    alone = [session.run(None, {**inputs, "x": inputs["x"][i : i + 1]})[0] for i in range(len(whole))]
    assert all(np.array_equal(one[0], other, equal_nan=True) for one, other in zip(alone, whole, strict=True)), f"{path}: the batch changes a sample"
    np.save(path.with_suffix(".npy"), whole)
"""

SAMPLE = """
import sys
import numpy as np
from scm_runtime import Generator
def latents(precision, count):
    with Generator(sys.argv[1], native_ops=True, session_options={"scm.float32_matmul_precision": precision}, cache_dir=False) as generate:
        return generate([0, 1, 2][:count], seed=range(count), output_type="latent").array
high = latents("high", 3)
error = np.abs(high - latents("highest", 3)).max()
assert 1e-8 < error < 1e-4, f"the error is {error}: larger than float32's, or the kernels did not run"
assert np.array_equal(latents("high", 1), high[:1])
assert np.array_equal(latents("medium", 3), high)  # there are no others
"""


def run_with(isa: str, program: str, *arguments: str | Path) -> None:
    run_python(program, *arguments, env={**os.environ, "SCM_OPS_MAX_ISA": isa})


def write_model(path: Path, dtype: type[np.generic], pads: int, *, channels_first: bool) -> None:
    element, domain = helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), "scm.channels_first" if channels_first else "scm.channels_last"
    names = ["x", "w", "b"][: 3 if channels_first else 2]
    node = helper.make_node("Conv" if channels_first else "Conv3x3", names, ["y"], domain=domain)
    if channels_first:
        node.attribute.append(helper.make_attribute("pads", [pads] * 4))
    inputs = [helper.make_tensor_value_info(name, element, [None] * {"x": 4, "w": 4, "b": 1}[name]) for name in names]
    graph = helper.make_graph([node], "convolution", inputs, [helper.make_tensor_value_info("y", element, None)])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(domain, 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


@pytest.mark.parametrize("isa", CONVOLUTION_ISAS)
def test_convolutions_of_random_shapes_equal_those_of_torch(isa: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    expected: dict[str, NDArray[np.float64]] = {}
    while len(expected) < CASES:
        batch, height, width = int(random.integers(*BATCHES)), *(int(side) for side in random.integers(*SIZES, 2))
        inputs, outputs = (int(channels) for channels in random.integers(*CHANNELS, 2))
        if batch * height * width * inputs * outputs > MAX_PRODUCTS:
            continue
        dtype, channels_first = (np.float32, np.float16)[random.integers(2)], bool(random.integers(2))
        x = random.standard_normal((batch, inputs, height, width)).astype(dtype)
        if x.size and random.integers(3) == 0:
            x.flat[random.integers(x.size)] = random.choice([np.nan, np.inf, -np.inf])
        kernel = 1 if channels_first and random.integers(2) else 3
        w = (random.standard_normal((outputs, inputs, kernel, kernel)) / np.sqrt(kernel**2 * inputs)).astype(dtype)
        b = random.standard_normal(outputs).astype(dtype) if channels_first else np.zeros(outputs, dtype)
        name = (
            f"{len(expected):02} {kernel}x{kernel} of {batch}x{height}x{width} {inputs} to {outputs} {np.dtype(dtype)} {'first' if channels_first else 'last'}"
        )
        doubles = [torch.from_numpy(value).double() for value in (x, w, b)]
        expected[name] = torch.nn.functional.conv2d(doubles[0], doubles[1], doubles[2], padding=kernel // 2).numpy()
        write_model(tmp_path / f"{name}.onnx", dtype, kernel // 2, channels_first=channels_first)
        arrays = {"x": x, "w": w, "b": b} if channels_first else {"x": np.ascontiguousarray(x.transpose(0, 2, 3, 1)), "w": w}
        np.savez(tmp_path / f"{name}.npz", **arrays)
    run_with(isa, RUN_MODELS, native_library(), tmp_path)
    for name, reference in expected.items():
        y = np.load(tmp_path / f"{name}.npy").astype(np.float64)
        if "last" in name:
            y = y.transpose(0, 3, 1, 2)
        assert y.shape == reference.shape, name
        finite = np.isfinite(reference)
        np.testing.assert_array_equal(y[~finite], reference[~finite], err_msg=name)
        if finite.any():
            rms = np.sqrt(np.mean(reference[finite] ** 2))
            error = np.abs(y[finite] - reference[finite])
            assert np.sqrt(np.mean(error**2)) < (2e-5 if "float32" in name else 1e-3) * rms, name
            assert error.max() < (MAX_ERROR if "float32" in name else 1e-2) * rms, name


@pytest.mark.parametrize("isa", CONVOLUTION_ISAS)
def test_samples_do_not_depend_on_the_batch_and_agree_with_highest(isa: str, tiny_bundle: Path) -> None:
    native_library()
    run_with(isa, SAMPLE, tiny_bundle)
