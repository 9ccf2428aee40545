"""The native kernel library in ONNX Runtime: which implementation runs, its results, and its errors for bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from scm_export.verification.tolerances import SAMPLE_ATOL
from scm_runtime import Generator
from scm_runtime.bundle.checksums import sha256
from scm_runtime.bundle.manifest import MANIFEST, OPS_DOMAIN, OPS_VERSION
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.errors import InvalidArgumentError
from scm_runtime.ort.options import MATMUL_PRECISION
from support import BFLOAT16, native_library

onnxruntime = load_onnxruntime()


@pytest.fixture(autouse=True)
def _library() -> None:
    native_library()


def test_images_are_the_same_with_and_without_the_kernels() -> None:
    seeds = list(range(100))
    with Generator("digits", native_ops=True) as kernels, Generator("digits", native_ops=False) as bodies:
        assert (kernels.info.native_ops, bodies.info.native_ops) == (True, False)
        for steps in (1, 2):
            one, other = (generate(seed=seeds, num_inference_steps=steps, output_type="np").array.astype(int) for generate in (kernels, bodies))
            difference = np.abs(one - other)
            assert difference.max() <= 1
            assert (difference > 0).mean() <= 1e-3


def test_the_half_precision_graphs_run_with_the_kernels() -> None:
    """Two float16 samplers diverge from each other, so each is compared with the float32 sampler."""
    errors = {}
    with Generator("digits", native_ops=False) as reference:
        expected = reference(seed=range(20), output_type="latent").array
    for native_ops in (True, False):
        with Generator("digits", dtype="fp16", native_ops=native_ops) as generate:
            errors[native_ops] = np.abs(generate(seed=range(20), output_type="latent").array - expected)
    assert errors[True].max() < 2 * SAMPLE_ATOL["fp16", "fp16"]
    assert errors[True].mean() < 1.5 * errors[False].mean()


def test_an_image_does_not_depend_on_its_batch() -> None:
    with Generator("digits", native_ops=True) as generate:
        together = generate(seed=[3, 5, 7, 11, 13, 17, 19], output_type="latent").array
        for index, seed in ((0, 3), (2, 7), (6, 19)):
            np.testing.assert_array_equal(generate(seed=seed, class_labels=seed % 10, output_type="latent").array[0], together[index])


@pytest.mark.skipif(not BFLOAT16, reason="needs a processor with AMX or AVX512-BF16")
def test_dense_operators_have_the_requested_precision(tiny_bundle: Path) -> None:
    """The error must be larger than rounding, or the kernels did not run, and no larger than the precision permits."""

    def latents(precision: str, batch_size: int) -> NDArray[np.float32]:
        with Generator(tiny_bundle, native_ops=True, session_options={MATMUL_PRECISION: precision}, cache_dir=False) as generate:
            return cast(NDArray[np.float32], generate([0, 1, 2][:batch_size], seed=range(batch_size), output_type="latent").array)

    reference = latents("highest", 3)
    errors = {precision: np.abs(latents(precision, 3) - reference).max() for precision in ("high", "medium")}
    assert errors["high"] < 1e-4 < errors["medium"] < 0.1
    assert errors["high"] > 1e-8  # the kernels ran
    for precision in errors:
        np.testing.assert_array_equal(latents(precision, 1), latents(precision, 3)[:1])


def test_high_precision_is_the_default(tiny_bundle: Path) -> None:
    with Generator(tiny_bundle, native_ops=True) as usual, Generator(tiny_bundle, native_ops=True, session_options={MATMUL_PRECISION: "high"}) as high:
        one, other = (generate([0, 1], seed=0, output_type="latent").array for generate in (usual, high))
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("value", ["low", 3, None])
def test_an_unknown_precision_is_an_error(tiny_bundle: Path, value: object) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"scm\.float32_matmul_precision must be one of highest, high, medium, got {value!r}"):
        Generator(tiny_bundle, session_options={MATMUL_PRECISION: value})


@pytest.mark.parametrize("op", ["MPSum", "NormModulateSiLU", "ConsistencyStep"])
def test_a_modified_function_body_shows_which_implementation_runs(op: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """Change the function body of one operator: only a session that runs function bodies may return something else."""
    modified = tmp_path / "modified.scm"
    shutil.copytree(tiny_bundle, modified)
    model = onnx.load(modified / "step.fp32.onnx", load_external_data=False)
    (function,) = (function for function in model.functions if (function.domain, function.name) == (OPS_DOMAIN, op))
    result = function.output[0]
    for node in function.node:
        node.output[:] = ["true_result" if name == result else name for name in node.output]
    function.node.append(helper.make_node("Add", ["true_result", "true_result"], [result]))
    (modified / "step.fp32.onnx").write_bytes(model.SerializeToString())

    manifest = json.loads((modified / MANIFEST).read_text())
    manifest["files"]["step.fp32.onnx"] = {"size": (modified / "step.fp32.onnx").stat().st_size, "sha256": sha256(modified / "step.fp32.onnx")}
    (modified / MANIFEST).write_text(json.dumps(manifest))

    def latents(bundle: Path, *, native_ops: bool) -> NDArray[np.float32]:
        with Generator(bundle, native_ops=native_ops) as generate:
            return cast(NDArray[np.float32], generate([0, 1], seed=5, output_type="latent").array)

    true = latents(tiny_bundle, native_ops=False)
    np.testing.assert_allclose(latents(modified, native_ops=True), true, atol=1e-4)
    assert np.abs(latents(modified, native_ops=False) - true).max() > 0.1


FLOAT, DOUBLE, INT64 = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "message"),
    [
        ("PixelNorm", {"x": (3, 0)}, {"eps": 1e-4}, r"scm::PixelNorm: x must have at least 1 channel, got the shape \[3, 0\]"),
        ("MPSum", {"a": (2, 3), "b": (2, 4)}, {"t": 0.5, "clip": 1.0}, r"scm::MPSum: b must have the shape of a, \[2, 3\], got the shape \[2, 4\]"),
        ("MPSum", {"a": (2, 3), "b": (2, 3)}, {"t": 0.5, "clip": -1.0}, r"scm::MPSum: clip must be at least 0, got -1"),
        ("MPCat", {"a": (2, 3), "b": (3, 4)}, {"t": 0.5}, r"scm::MPCat: b must have 2 \(as in a\) on axis 0, got the shape \[3, 4\]"),
        (
            "ModulateSiLU",
            {"y": (2, 5, 3), "scale": (2, 4)},
            {},
            r"scm::ModulateSiLU: scale must have 3 \(the channels of y\) on axis 1, got the shape",
        ),
        ("ModulateSiLU", {"y": (2, 5, 3), "scale": (2, 1, 3)}, {}, r"scm::ModulateSiLU: scale must have 2 axes, got the shape \[2, 1, 3\]"),
        ("NormModulateSiLU", {"y": (2, 5, 3), "modulation": (2, 3)}, {"eps": 1e-4}, r"modulation must have 6 \(twice the channels of y\) on axis 1"),
        ("CosineAttention", {"qkv": (2, 9)}, {"heads": 1, "eps": 1e-4}, r"scm::CosineAttention: qkv must have 3 axes, got the shape \[2, 9\]"),
        ("CosineAttention", {"qkv": (1, 4, 9)}, {"heads": 2, "eps": 1e-4}, r"channels that are a multiple of 3 \* heads = 6, got the shape \[1, 4, 9\]"),
        ("CosineAttention", {"qkv": (1, 4, 9)}, {"heads": 0, "eps": 1e-4}, r"scm::CosineAttention: heads must be in \[1, 2\^31\), got 0"),
        (
            "Attention",
            {"q": (1, 4, 2, 300), "k": (1, 4, 2, 300), "v": (1, 4, 2, 3)},
            {"scale": 1.0},
            r"scm::Attention: q must have at most 256 channels per head, got the shape \[1, 4, 2, 300\]",
        ),
        (
            "MaskedAttention",
            {"q": (1, 4, 2, 3), "k": (1, 5, 2, 3), "v": (1, 5, 2, 3), "mask": (1, 1, 4, 4)},
            {"scale": 1.0},
            r"scm::MaskedAttention: mask must have 5 \(the keys\) on axis 3, got the shape \[1, 1, 4, 4\]",
        ),
        (
            "GroupNorm",
            {"x": (1, 5, 3), "scale": (5,), "bias": (5,)},
            {"groups": 2, "eps": 1e-5},
            r"scm::GroupNorm: .*a multiple of groups = 2.*\[1, 5, 3\]",
        ),
        ("DepthwiseGLU", {"x": (1, 4, 5, 6), "w": (4, 1, 3, 5), "b": (4,)}, {}, r"scm::DepthwiseGLU: w must have .*\[4, 1, 3, 5\]"),
        ("ToImage", {"x": (1, 3, 4)}, {"scale": 1.0, "offset": 0.0}, r"scm::ToImage: x must have 4 axes, got the shape \[1, 3, 4\]"),
        ("PixelNorm", {"x": (3, 4)}, {}, r"scm::PixelNorm: .*eps"),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["at load", "at run"])
def test_bad_input_is_named(op: str, inputs: dict[str, tuple[int, ...]], attributes: Mapping[str, float], message: str, known: bool) -> None:
    """With known sizes in the graph, creating the session fails; otherwise the run fails."""
    with pytest.raises(Exception, match=message):  # ONNX Runtime has an exception class per error code
        _run(op, {name: (FLOAT, shape) for name, shape in inputs.items()}, attributes, known=known)


def test_an_unsupported_dtype_is_named() -> None:
    with pytest.raises(Exception, match=r"tensor\(double\).*MPSiLU"):
        _run("MPSiLU", {"x": (DOUBLE, (2, 3))}, {}, known=True)


def test_a_draw_out_of_range_is_named() -> None:
    with pytest.raises(Exception, match=r"scm::PhiloxNormal: draw must be in \[0, 2\^32\), got -1"):
        _run("PhiloxNormal", {"seeds": (INT64, (1,)), "draw": (INT64, ()), "scale": (FLOAT, ())}, {"shape": [3]}, known=True, fill=-1)


def _run(op: str, inputs: Mapping[str, tuple[int, tuple[int, ...]]], attributes: Mapping[str, Any], *, known: bool, fill: int = 1) -> None:
    """Run one node without a function body. ``known``: declare the input sizes in the graph."""
    given = [helper.make_tensor_value_info(name, kind, shape if known else [None] * len(shape)) for name, (kind, shape) in inputs.items()]
    node = helper.make_node(op, list(inputs), ["result"], domain=OPS_DOMAIN)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(OPS_DOMAIN, OPS_VERSION)]
    model = helper.make_model(helper.make_graph([node], op, given, [onnx.ValueInfoProto(name="result")]), opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native_library()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, {name: np.full(shape, fill, helper.tensor_dtype_to_np_dtype(kind)) for name, (kind, shape) in inputs.items()})
