"""Every operator over random shapes, also with NaN and infinity: the CPU kernels for each instruction set agree with the function body, alone and in any batch.

The library reads SCM_OPS_MAX_ISA once in a process, so the kernels run in processes of their own. Attention has its own test (test_attention_shapes.py), and
convolutions are also compared with PyTorch (test_convolutions.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from operator_models import PRODUCTS, Arrays, Case, arrays, one_node, tolerance
from scm_export.ops import OPERATORS
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from support import KERNEL_ISAS, native_library, run_python

onnxruntime = load_onnxruntime()

CASES_PER_OPERATOR, OPSET = 8, 20
MAX_ELEMENTS, MAX_PRODUCTS = 4e5, 2e7
CONVOLUTIONS = ("scm.channels_last::Conv", "scm.channels_first::Conv", "scm.fused::Conv")  # not below AVX2

RUN_MODELS = """
import json, sys
from pathlib import Path
import numpy as np
from scm_runtime.common.load_onnxruntime import load_onnxruntime
onnxruntime = load_onnxruntime()
library, folder, results, without_kernel = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), tuple(json.loads(sys.argv[4]))
batched = json.loads((folder / "batched.json").read_text())
for path in sorted(folder.glob("*.onnx")):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("scm.float32_matmul_precision", "high")
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = dict(np.load(path.with_suffix(".npz")))
    outputs = session.run(None, inputs)
    np.savez(results / path.with_suffix(".npz").name, *outputs)
    for i in range(len(outputs[0]) if batched[path.stem] and not path.stem.startswith(without_kernel) else 0):
        alone = session.run(None, {name: value[i : i + 1] if name in batched[path.stem] else value for name, value in inputs.items()})
        for one, whole in zip(alone, outputs, strict=True):
            np.testing.assert_array_equal(one[0], whole[i], err_msg=f"{path.stem}: the batch changes sample {i}", strict=True)
"""


class Sizes:
    """Random sizes of tensors with at most MAX_ELEMENTS elements."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def draw(self, low: int, high: int) -> int:
        """Return an integer from ``low`` to ``high``, both included."""
        return int(self.rng.integers(low, high + 1))

    def any_map(self, multiple: int = 1, min_batch: int = 0) -> tuple[int, int, int, int]:
        """Return batch, height, width and channels."""
        while True:
            n, h, w, c = self.draw(min_batch, 5), self.draw(1, 70), self.draw(1, 70), multiple * self.draw(1, 200 // multiple)
            if n * h * w * c <= MAX_ELEMENTS:
                return n, h, w, c

    def weights(self, shape: tuple[int, ...], terms: int) -> np.ndarray[Any, Any]:
        """Return weights, scaled so that sums over so many terms are of order 1."""
        return self.rng.standard_normal(shape) / math.sqrt(terms)

    def convolved(self, side: int) -> tuple[tuple[int, int, int, int], int]:
        """Return a feature map and a number of output channels of a convolution, or of a product if ``side`` is 1."""
        while True:
            shape, outputs = self.any_map(), self.draw(1, 200)
            if math.prod(shape) * side**2 * outputs <= MAX_PRODUCTS:
                return shape, outputs

    def blend(self) -> dict[str, float]:
        """Return the attributes of a magnitude-preserving sum."""
        return {"t": float(self.rng.random()), "clip": float(self.rng.choice([math.inf, 256.0, 0.5]))}


def unary(sizes: Sizes) -> Case:
    return Case((sizes.any_map(),), {})


def pixel_norm(sizes: Sizes) -> Case:
    return Case((sizes.any_map(),), {"eps": 1e-4})


def mp_sum(sizes: Sizes) -> Case:
    shape = sizes.any_map()
    return Case((shape, shape), sizes.blend())


def mp_cat(sizes: Sizes) -> Case:
    shape = sizes.any_map()
    return Case((shape, (*shape[:-1], sizes.draw(1, 200))), {"t": sizes.blend()["t"]})


def modulate(sizes: Sizes) -> Case:
    shape = sizes.any_map()
    return Case((shape, (shape[0], shape[-1])), {})


def norm_modulate(sizes: Sizes) -> Case:
    shape = sizes.any_map()
    return Case((shape, (shape[0], 2 * shape[-1])), {"eps": 1e-4})


def norm_modulate_columns(sizes: Sizes) -> Case:
    shape, before, after = sizes.any_map(), sizes.draw(0, 40), sizes.draw(0, 40)
    end = before + 2 * shape[-1]
    return Case((shape, (shape[0], end + after)), {"begin": (before,), "end": (end,), "eps": 1e-4})


def cosine_attention(sizes: Sizes) -> Case:
    heads, size = sizes.draw(1, 4), sizes.draw(1, 100)
    return Case(((sizes.draw(0, 5), sizes.draw(1, 70), 3 * heads * size),), {"heads": heads, "eps": 1e-4})


def linear_attention(sizes: Sizes) -> Case:
    heads = sizes.draw(1, 4)
    shape = (sizes.draw(0, 5), sizes.draw(1, 70), heads * sizes.draw(1, 50))
    return Case((shape, shape, shape), {"heads": heads, "eps": 1e-15})


def depthwise_glu(sizes: Sizes) -> Case:
    n, h, w, c = sizes.any_map(multiple=2)
    return Case(((n, c, h, w), sizes.weights((c, 1, 3, 3), 9), (c,)), {})


def geglu(sizes: Sizes) -> Case:
    shape = sizes.any_map(multiple=2)
    return Case((shape, shape[-1:]), {})


def conv3x3(sizes: Sizes) -> Case:
    shape, outputs = sizes.convolved(3)
    return Case((shape, sizes.weights((outputs, shape[-1], 3, 3), 9 * shape[-1])), {})


def conv3x3_modulate(sizes: Sizes) -> Case:
    shape, outputs = sizes.convolved(3)
    before, after = sizes.draw(0, 40), sizes.draw(0, 40)
    columns = {"begin": (before,), "end": (before + outputs,)}
    return Case((shape, sizes.weights((outputs, shape[-1], 3, 3), 9 * shape[-1]), (shape[0], before + outputs + after)), columns)


def conv3x3_mp_sum(sizes: Sizes) -> Case:
    shape, outputs = sizes.convolved(3)
    return Case((shape, sizes.weights((outputs, shape[-1], 3, 3), 9 * shape[-1]), (*shape[:-1], outputs)), sizes.blend())


def conv(sizes: Sizes) -> Case:
    side = 1 + 2 * sizes.draw(0, 1)
    (n, h, w, c), outputs = sizes.convolved(side)
    return Case(((n, c, h, w), sizes.weights((outputs, c, side, side), side**2 * c), (outputs,)), {"pads": (side // 2,) * 4})


def matmul(sizes: Sizes) -> Case:
    shape, outputs = sizes.convolved(1)
    return Case((shape, sizes.weights((shape[-1], outputs), shape[-1])), {})


def matmul_mp_sum(sizes: Sizes) -> Case:
    shape, outputs = sizes.convolved(1)
    return Case((shape, sizes.weights((shape[-1], outputs), shape[-1]), (*shape[:-1], outputs)), sizes.blend())


def group_norm(sizes: Sizes) -> Case:
    groups = sizes.draw(1, 32)
    n, h, w, c = sizes.any_map(multiple=groups, min_batch=1)  # the body's Reshape infers the size of a group, which it cannot for no samples
    return Case(((n, c, h, w), (c,), (c,)), {"groups": groups, "eps": 1e-5})


def group_norm_modulate(sizes: Sizes) -> Case:
    case = group_norm(sizes)
    n, c, *_ = case.inputs[0]
    return Case((*case.inputs, (n, 2 * c)), case.attributes)


def layer_norm(sizes: Sizes) -> Case:
    shape = sizes.any_map()
    return Case((shape, shape[-1:], shape[-1:]), {"eps": 1e-5})


def layer_norm_modulate(sizes: Sizes) -> Case:
    n, length, c = sizes.draw(0, 5), sizes.draw(1, 70), sizes.draw(1, 200)
    return Case(((n, length, c), (n, 1, c), (n, 1, c)), {"eps": 1e-6})


def rms_norm(sizes: Sizes) -> Case:
    shape = sizes.any_map()
    return Case((shape, shape[-1:]), {"eps": 1e-5})


def consistency_step(sizes: Sizes) -> Case:
    n, h, w, c = sizes.any_map()
    return Case(((n, c, h, w),) * 3 + (sizes.rng.random(n), sizes.rng.random(n)), {"sigma_data": 0.5})


def philox_normal(sizes: Sizes) -> Case:
    n, *shape = sizes.any_map()
    seeds = sizes.rng.integers(-(2**63), 2**63 - 1, n)
    return Case((seeds, np.array(sizes.draw(0, 2**32 - 1)), np.array(0.5)), {"shape": tuple(shape)})


def to_image(sizes: Sizes) -> Case:
    n, h, w, c = sizes.any_map()
    return Case(((n, c, h, w),), {"scale": 64.0, "offset": 127.5})


RANDOM: dict[str, Callable[[Sizes], Case]] = {
    "scm::PixelNorm": pixel_norm,
    "scm::MPSiLU": unary,
    "scm::MPSum": mp_sum,
    "scm::MPCat": mp_cat,
    "scm::ModulateSiLU": modulate,
    "scm::NormModulateSiLU": norm_modulate,
    "scm::CosineAttention": cosine_attention,
    "scm::ReLULinearAttention": linear_attention,
    "scm::DepthwiseGLU": depthwise_glu,
    "scm::GEGLU": geglu,
    "scm::ConsistencyStep": consistency_step,
    "scm::PhiloxNormal": philox_normal,
    "scm::ToImage": to_image,
    "scm::GroupNorm": group_norm,
    "scm::GroupNormSiLU": group_norm,
    "scm::GroupNormModulateSiLU": group_norm_modulate,
    "scm::LayerNorm": layer_norm,
    "scm::LayerNormModulate": layer_norm_modulate,
    "scm::RMSNorm": rms_norm,
    "scm.channels_last::Conv3x3": conv3x3,
    "scm.channels_last::MatMul": matmul,
    "scm.channels_first::Conv": conv,
    "scm.fused::Conv3x3ModulateSiLU": conv3x3_modulate,
    "scm.fused::Conv3x3MPSum": conv3x3_mp_sum,
    "scm.fused::MatMulMPSum": matmul_mp_sum,
    "scm.fused::NormModulateSiLU": norm_modulate_columns,
}
ELSEWHERE = ("scm::Attention", "scm::MaskedAttention")  # test_attention_shapes.py


@dataclass(frozen=True)
class Expected:
    """The results of a function body."""

    op: str
    dtype: str
    outputs: Arrays


def random_models() -> Iterator[tuple[str, str, Case, Arrays]]:
    """Yield a name, an operator, a case and its inputs, some with NaN or infinity in one element."""
    rng = np.random.default_rng(0)
    for op, random in RANDOM.items():
        for i in range(CASES_PER_OPERATOR):
            dtype = ("float32", "float32", "float16")[rng.integers(3)]
            case = random(Sizes(rng))
            inputs = arrays(op, case, dtype)
            first = inputs[0]
            if i % 3 == 2 and first.size and first.dtype.kind == "f":
                first.flat[rng.integers(first.size)] = rng.choice([math.nan, math.inf, -math.inf])
            yield f"{op.replace('::', '.')}-{i} of {' and '.join('x'.join(map(str, x.shape)) for x in inputs)} {dtype}", op, case, inputs


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Expected]]:
    """The models with their inputs in a folder, and what their function bodies compute."""
    folder = tmp_path_factory.mktemp("models")
    results: dict[str, Expected] = {}
    batched: dict[str, list[str]] = {}
    for name, op, case, inputs in random_models():
        operator = OPERATORS[op]
        model = one_node(op, inputs, case.attributes, 1 + operator.activated, OPSET)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        values = dict(zip(operator.inputs, inputs, strict=True))
        results[name] = Expected(op, name.rsplit(" ", 1)[1], tuple(session.run(None, values)))
        per_sample = [key for key, value in values.items() if (value.ndim > 1 and key != "w") or key in ("seeds", "t", "t_next")]
        # Products in float32 have no kernels on most processors, and ONNX Runtime's may depend on the batch.
        batched[name] = [] if operator.domain in PRODUCTS and not op.startswith(CONVOLUTIONS) else per_sample
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
        np.savez(folder / f"{name}.npz", **values)  # type: ignore[arg-type]  # NumPy's stub mistakes them for allow_pickle
    (folder / "batched.json").write_text(json.dumps(batched))
    return folder, results


def test_every_operator_has_random_shapes() -> None:
    assert {*RANDOM, *ELSEWHERE} == set(OPERATORS)


@pytest.mark.parametrize("isa", KERNEL_ISAS)
def test_kernels_of_random_shapes_agree_with_the_function_bodies(isa: str, expected: tuple[Path, dict[str, Expected]], tmp_path: Path) -> None:
    folder, results = expected
    without_kernel = [name.replace("::", ".") for name in CONVOLUTIONS] if isa == "generic" else []
    run_python(RUN_MODELS, native_library(), folder, tmp_path, json.dumps(without_kernel), env={**os.environ, "SCM_OPS_MAX_ISA": isa})
    for name, body in results.items():
        found = np.load(tmp_path / f"{name}.npz")
        kind = body.outputs[0].dtype.name
        atol, rtol = tolerance(body.op, kind)
        for one, other in zip((found[key] for key in found.files), body.outputs, strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape), name
            np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), atol=atol, rtol=rtol, err_msg=name)
