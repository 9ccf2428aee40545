"""Every implementation of every operator against its PyTorch reference in float32, for several dtypes, odd sizes and empty tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from operator_models import Arrays, Attribute, Case, arrays, one_node, tolerance, type_name
from scm_export import ops
from scm_export.ops import OPERATORS
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.ort.options import MATMUL_PRECISION
from support import native_library

onnxruntime = load_onnxruntime()

Implementation = Callable[[str, Arrays, Mapping[str, Attribute], int], Arrays]
"""Computes the outputs from an operator's name, inputs, attributes and number of outputs."""

# ----------------------------------------------------------------------------
# Cases.


MAPS = [(3, 1), (1, 5, 3), (3, 64, 7), (1, 7, 5, 64), (3, 4, 3, 65), (3, 77, 64), (0, 4, 4, 7), (3, 0, 4, 7)]
EXTREMES = np.array([[0, 0, 0, 0], [6e4, 6e4, -6e4, 6e4], [1e-7, 0, 0, 0]])
NOT_FINITE = np.array([[-math.inf, 1.0, math.inf], [-1.0, math.nan, 0.0]])
NEGATIVE_QUERY = np.array([[[-1.0, -2.0], [1.0, -2.0]]])  # the denominator of its first token is 0
NAN_TOKENS = np.concatenate([np.full((1, 2, 4), math.nan), np.ones((1, 2, 4))])
TIMES = np.array([0.0, 1.1, 1.5645])
SEEDS = np.array([0, 7, -1, 2**32, -(2**63), 2**63 - 1])
LEVELS = np.array([-math.inf, -3, -1.9921875, -1.0, -0.0078125, 0.0, 0.0078125, 0.5, 1.9921875, 3, math.inf, math.nan]).reshape(2, 1, 2, 3)


GROUPED = [
    Case((shape, shape[1:2], shape[1:2]), {"groups": groups, "eps": eps})
    for shape, groups, eps in [((3, 4, 5, 7), 2, 1e-5), ((1, 64, 8, 8), 32, 1e-6), ((2, 6, 65), 1, 1e-5), ((3, 65, 3, 3), 65, 0.1), ((2, 8, 33, 64), 4, 1e-5)]
]


def weights(*shape: int) -> NDArray[Any]:
    """Return random weights, scaled so that products with them are of order 1."""
    return np.random.default_rng(1).standard_normal(shape) / math.sqrt(math.prod(shape[:-1]))


def mask(*shape: int) -> NDArray[Any]:
    """Return a mask of attention that hides about a third of the keys, but never the first one."""
    values = np.random.default_rng(2).standard_normal(shape)
    values[..., 1:][values[..., 1:] < -0.5] = -math.inf
    return values


CASES: dict[str, list[Case]] = {
    "scm::PixelNorm": [Case((shape,), {"eps": 1e-4}) for shape in MAPS] + [Case((EXTREMES,), {"eps": 1e-4}), Case(((2, 5),), {"eps": 0.5})],
    "scm::MPSiLU": [*(Case((shape,), {}) for shape in [*MAPS, ()]), Case((NOT_FINITE,), {}), Case((np.linspace(-200, 200, 801).reshape(1, -1),), {})],
    "scm::MPSum": [
        Case((NOT_FINITE, np.ones((2, 3))), {"t": 0.3, "clip": math.inf}),
        *(Case((shape, shape), {"t": 0.3, "clip": 256.0}) for shape in MAPS),
        *(Case(((3, 5), (3, 5)), {"t": t, "clip": clip}) for t, clip in [(0.0, math.inf), (1.0, math.inf), (0.5, 0.5)]),
    ],
    "scm::MPCat": [
        Case((NOT_FINITE, np.ones((2, 1))), {"t": 0.5}),
        *(Case((shape, (*shape[:-1], width)), {"t": 0.5}) for shape, width in zip(MAPS, (64, 1, 3, 65, 7, 128, 7, 7), strict=True)),
        *(Case(((3, 5, 3), (3, 5, 4)), {"t": t}) for t in (0.0, 0.3, 1.0)),
    ],
    "scm::ModulateSiLU": [*(Case((shape, (shape[0], shape[-1])), {}) for shape in MAPS), Case((NOT_FINITE, np.array([[1.0, -1, -1], [1, 1, -math.inf]])), {})],
    "scm::NormModulateSiLU": [
        *(Case((shape, (shape[0], 2 * shape[-1])), {"eps": 1e-4}) for shape in MAPS),
        Case((NOT_FINITE, np.ones((2, 6))), {"eps": 1e-4}),
        Case((np.ones((1, 3)), np.array([[1.0, 1, 1, -math.inf, 1, math.inf]])), {"eps": 1e-4}),
    ],
    "scm::CosineAttention": [
        Case(((n, length, 3 * channels),), {"heads": heads, "eps": 1e-4})
        for n, length, channels, heads in [
            *((1, 1, 1, 1), (3, 5, 3, 3), (3, 64, 64, 2), (1, 77, 65, 1), (3, 77, 24, 3), (0, 5, 8, 2), (3, 0, 8, 2)),
            *((1, 64, 64, 1), (1, 77, 64, 1), (3, 256, 128, 2), (1, 1024, 64, 1)),  # heads of 64 channels, as in the networks
        ]
    ],
    "scm::ReLULinearAttention": [
        *(
            Case(((n, length, channels),) * 3, {"heads": heads, "eps": 1e-15})
            for n, length, channels, heads in [
                *((1, 1, 1, 1), (3, 5, 3, 3), (3, 64, 64, 2), (1, 77, 65, 1), (3, 130, 24, 3), (1, 9, 256, 1), (0, 5, 8, 2), (3, 0, 8, 2)),
                (1, 1024, 64, 2),  # heads of 32 channels, as in SANA
            ]
        ),
        Case((NEGATIVE_QUERY, (1, 2, 2), (1, 2, 2)), {"heads": 1, "eps": 1e-15}),
        Case((NAN_TOKENS, (2, 2, 4), NAN_TOKENS), {"heads": 2, "eps": 1e-3}),
    ],
    "scm::DepthwiseGLU": [
        *(
            Case((shape, weights(3, 3, 1, shape[1]).transpose(3, 2, 0, 1), (shape[1],)), {})
            for shape in [(1, 2, 1, 1), (3, 6, 2, 5), (1, 4, 1, 40), (2, 66, 17, 1), (3, 8, 8, 16), (1, 2, 3, 530), (2, 10, 32, 32), (0, 4, 3, 3)]
        ),
        Case((NOT_FINITE.reshape(1, 2, 1, 3), np.ones((2, 1, 3, 3)), (2,)), {}),
    ],
    "scm::GEGLU": [
        *(Case((shape, (shape[-1],)), {}) for shape in [(3, 2), (1, 5, 6), (3, 64, 14), (1, 7, 5, 128), (3, 77, 130), (0, 4, 8), (3, 0, 8), (2, 3, 0)]),
        Case((np.linspace(-30, 30, 802).reshape(1, -1), np.zeros(802)), {}),
        Case((np.concatenate([np.ones((2, 3)), NOT_FINITE], axis=-1), np.zeros(6)), {}),
    ],
    "scm::Attention": [
        Case(((n, length, heads, size), (n, keys, key_heads, size), (n, keys, key_heads, width)), {"scale": scale})
        for n, length, keys, heads, key_heads, size, width, scale in [
            *((1, 1, 1, 1, 1, 1, 1, 1.0), (3, 5, 7, 2, 1, 3, 4, 0.5), (1, 64, 77, 8, 8, 40, 40, 0.2), (3, 70, 130, 6, 3, 33, 65, 0.1)),
            *((2, 256, 256, 2, 2, 8, 8, 0.3), (1, 65, 129, 1, 1, 256, 256, 0.0625)),
            *((0, 5, 7, 2, 1, 3, 4, 0.5), (3, 0, 7, 2, 1, 3, 4, 0.5), (3, 5, 0, 2, 2, 3, 4, 0.5)),
        ]
    ],
    "scm::MaskedAttention": [
        *(
            Case(((n, length, heads, 8), (n, keys, key_heads, 8), (n, keys, key_heads, 12), mask(n, *axes, keys)), {"scale": 0.35})
            for n, length, keys, heads, key_heads, axes in [
                *((1, 1, 1, 1, 1, (1, 1)), (3, 5, 7, 2, 1, (1, 1)), (3, 5, 77, 4, 2, (4, 5)), (1, 70, 130, 2, 2, (1, 70)), (0, 5, 7, 2, 2, (1, 1))),
                *((3, 0, 7, 2, 2, (1, 1)), (3, 5, 0, 2, 2, (1, 1))),
            ]
        ),
        # Queries that may attend to no key, and a key of NaN that nobody may attend to: softmax adds -infinity to its score, which stays NaN.
        Case(((1, 3, 1, 4), (1, 5, 1, 4), (1, 5, 1, 4), np.array([[0.0] * 5, [-math.inf] * 5, [-math.inf] * 4 + [0.0]]).reshape(1, 1, 3, 5)), {"scale": 0.5}),
        Case(
            ((1, 2, 1, 3), np.array([[1.0, 0, 0], [math.nan, 0, 0]]).reshape(1, 2, 1, 3), (1, 2, 1, 3), np.array([0.0, -math.inf]).reshape(1, 1, 1, 2)),
            {"scale": 0.5},
        ),
    ],
    "scm::ConsistencyStep": [
        Case((shape, shape, shape, TIMES[: shape[0]], TIMES[::-1][: shape[0]].copy()), {"sigma_data": 0.5})
        for shape in [(3, 1), (1, 3, 7, 7), (3, 4, 5, 65), (0, 3, 7, 7), (3, 3, 0, 7)]
    ],
    "scm::PhiloxNormal": [
        Case((SEEDS[:n], np.array(draw), np.array(scale)), {"shape": shape})
        for n, draw, scale, shape in [(6, 0, 1.0, (3, 8, 8)), (3, 2**32 - 1, 0.5, (65,)), (1, 7, 80.0, (1, 1, 1)), (0, 1, 1.0, (3, 5)), (3, 1, 1.0, (3, 0, 5))]
    ],
    "scm.channels_last::Conv3x3": [
        Case((shape, weights(shape[-1], 3, 3, outputs).transpose(3, 0, 1, 2)), {})
        for shape, outputs in [
            *(((1, 1, 1, 1), 1), ((3, 2, 3, 5), 4), ((1, 4, 4, 33), 65), ((3, 8, 8, 64), 48), ((2, 33, 17, 31), 32), ((1, 32, 32, 64), 64)),
            ((0, 4, 4, 7), 3),
        ]
    ],
    "scm.channels_last::MatMul": [
        Case((shape, weights(shape[-1], outputs)), {})
        for shape, outputs in [((1, 1), 1), ((3, 4, 5, 65), 33), ((2, 16, 16, 64), 192), ((1, 1023, 96), 48), ((0, 4, 7), 3), ((3, 0, 7), 3)]
    ],
    "scm.channels_first::Conv": [
        Case((shape, weights(shape[1], side, side, outputs).transpose(3, 0, 1, 2), (outputs,)), {"pads": (side // 2,) * 4})
        for side, shape, outputs in [
            *((3, (1, 1, 1, 1), 1), (3, (3, 3, 2, 5), 4), (3, (1, 33, 4, 4), 65), (3, (3, 64, 8, 8), 48), (3, (2, 31, 33, 17), 32), (3, (0, 7, 4, 4), 3)),
            *((1, (1, 1, 1, 1), 1), (1, (3, 33, 7, 5), 65), (1, (2, 64, 33, 17), 48), (1, (0, 7, 4, 4), 3)),
        ]
    ],
    "scm.fused::Conv3x3ModulateSiLU": [
        Case((shape, weights(shape[-1], 3, 3, end - begin).transpose(3, 0, 1, 2), (shape[0], columns)), {"begin": (begin,), "end": (end,)})
        for shape, columns, begin, end in [
            *(((1, 1, 1, 1), 1, 0, 1), ((3, 2, 3, 5), 9, 5, 9), ((1, 4, 4, 33), 100, 7, 72), ((3, 8, 8, 64), 64, 16, 64), ((2, 33, 17, 31), 40, 0, 32)),
            *(((1, 16, 16, 64), 256, 128, 192), ((0, 4, 4, 7), 5, 2, 5)),
        ]
    ],
    "scm.fused::Conv3x3MPSum": [
        Case((shape, weights(shape[-1], 3, 3, outputs).transpose(3, 0, 1, 2), (*shape[:-1], outputs)), {"t": t, "clip": clip})
        for shape, outputs, t, clip in [
            *(((1, 1, 1, 1), 1, 0.3, 256.0), ((3, 2, 3, 5), 4, 0.0, 0.5), ((1, 4, 4, 33), 65, 1.0, math.inf), ((3, 8, 8, 64), 48, 0.3, math.inf)),
            *(((2, 33, 17, 31), 32, 0.3, 0.5), ((1, 16, 16, 64), 64, 0.3, 256.0), ((0, 4, 4, 7), 3, 0.3, 256.0)),
        ]
    ],
    "scm.fused::MatMulMPSum": [
        Case((shape, weights(shape[-1], outputs), (*shape[:-1], outputs)), {"t": t, "clip": clip})
        for shape, outputs, t, clip in [
            *(((1, 1), 1, 0.3, 256.0), ((3, 4, 5, 65), 33, 0.0, 0.5), ((2, 16, 16, 64), 64, 0.3, 256.0), ((1, 1023, 96), 48, 1.0, math.inf)),
            *(((0, 4, 7), 3, 0.3, 256.0), ((3, 0, 7), 3, 0.3, 256.0)),
        ]
    ],
    "scm.fused::NormModulateSiLU": [
        Case((shape, (shape[0], before + 2 * shape[-1] + after)), {"begin": (before,), "end": (before + 2 * shape[-1],), "eps": 1e-4})
        for shape, before, after in zip(MAPS, (0, 0, 7, 64, 1, 3, 2, 0), (0, 5, 0, 32, 1, 0, 2, 0), strict=True)
    ],
    "scm::GroupNorm": GROUPED,
    "scm::GroupNormSiLU": GROUPED,
    "scm::GroupNormModulateSiLU": [Case((*case.inputs, (case.inputs[0][0], 2 * case.inputs[0][1])), case.attributes) for case in GROUPED],
    "scm::LayerNorm": [Case((shape, shape[-1:], shape[-1:]), {"eps": 1e-5}) for shape in MAPS] + [Case((EXTREMES, (4,), (4,)), {"eps": 1e-5})],
    "scm::LayerNormModulate": [
        Case((shape, (shape[0], 1, shape[2]), (shape[0], 1, shape[2])), {"eps": 1e-6}) for shape in [(1, 1, 1), (3, 77, 64), (2, 5, 65), (0, 5, 3), (3, 0, 3)]
    ],
    "scm::RMSNorm": [Case((shape, shape[-1:]), {"eps": 1e-5}) for shape in MAPS],
    "scm::ToImage": [
        *(Case((shape,), {"scale": 64.0, "offset": 127.5}) for shape in [(1, 1, 7, 5), (3, 3, 5, 7), (2, 4, 64, 65), (0, 3, 5, 7), (3, 3, 0, 7)]),
        Case(((3, 3, 65, 65),), {"scale": 127.5, "offset": 127.5}),
        Case((LEVELS,), {"scale": 64.0, "offset": 127.5}),
    ],
}


# ----------------------------------------------------------------------------
# Implementations.


def in_torch(op: str, inputs: Arrays, attributes: Mapping[str, Attribute], outputs: int) -> Arrays:
    functions: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
        "scm::PixelNorm": (ops.pixel_norm, ops.pixel_norm_silu)[outputs - 1],
        "scm::MPSiLU": ops.mp_silu,
        "scm::MPSum": (ops.mp_sum, ops.mp_sum_silu)[outputs - 1],
        "scm::MPCat": (ops.mp_cat, ops.mp_cat_silu)[outputs - 1],
        "scm::ModulateSiLU": ops.modulate_silu,
        "scm::NormModulateSiLU": ops.norm_modulate_silu,
        "scm::CosineAttention": ops.cosine_attention,
        "scm::ReLULinearAttention": ops.relu_linear_attention,
        "scm::DepthwiseGLU": ops.depthwise_glu,
        "scm::GEGLU": ops.geglu,
        "scm::Attention": ops.attention,
        "scm::MaskedAttention": ops.attention,
        "scm::ConsistencyStep": ops.consistency_step,
        "scm::PhiloxNormal": lambda seeds, draw, scale, shape: ops.philox_normal(seeds, int(draw), shape, float(scale)),
        "scm::ToImage": ops.to_image,
        "scm::GroupNorm": ops.group_norm,
        "scm::GroupNormSiLU": ops.group_norm_silu,
        "scm::GroupNormModulateSiLU": ops.group_norm_modulate_silu,
        "scm::LayerNorm": ops.layer_norm,
        "scm::LayerNormModulate": ops.layer_norm_modulate,
        "scm::RMSNorm": ops.rms_norm,
        "scm.channels_last::Conv3x3": ops.conv3x3,
        "scm.channels_last::MatMul": lambda x, w: ops.matmul(x, w.t()),
        "scm.channels_first::Conv": ops.conv,
        "scm.fused::Conv3x3ModulateSiLU": lambda x, w, scales, begin, end: ops.conv3x3_modulate_silu(x, w, scales, *begin, *end),
        "scm.fused::Conv3x3MPSum": ops.conv3x3_mp_sum,
        "scm.fused::MatMulMPSum": lambda x, w, skip, t, clip: ops.matmul_mp_sum(x, w.t(), skip, t, clip),
        "scm.fused::NormModulateSiLU": lambda y, modulation, begin, end, eps: ops.norm_modulate_silu_columns(y, modulation, begin[0], end[0], eps),
    }
    found = functions[op](*(torch.from_numpy(array) for array in inputs), **attributes)
    return tuple(tensor.numpy() for tensor in (found if isinstance(found, tuple) else (found,)))


def in_onnxruntime(opset: int, *, kernel: bool = False, provider: str = "CPUExecutionProvider") -> Implementation:
    def run(op: str, inputs: Arrays, attributes: Mapping[str, Attribute], outputs: int) -> Arrays:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if kernel:
            options.add_session_config_entry(MATMUL_PRECISION, "high")  # dense operators have only CPU kernels
            options.register_custom_ops_library(str(native_library()))
        model = one_node(op, inputs, attributes, outputs, opset).SerializeToString()
        session = onnxruntime.InferenceSession(model, options, providers=[provider])
        assert session.get_providers()[0] == provider
        return tuple(session.run(None, dict(zip(OPERATORS[op].inputs, inputs, strict=True))))

    return run


def in_reference_evaluator(op: str, inputs: Arrays, attributes: Mapping[str, Attribute], outputs: int) -> Arrays:
    evaluator = ReferenceEvaluator(one_node(op, inputs, attributes, outputs, opset=20))
    with np.errstate(all="ignore"):  # NumPy would warn about overflow and NaN
        found = evaluator.run(None, dict(zip(OPERATORS[op].inputs, inputs, strict=True)))
    return tuple(np.asarray(array) for array in found)


IMPLEMENTATIONS = [
    pytest.param(in_torch, id="torch"),
    pytest.param(in_reference_evaluator, id="body in the reference evaluator"),
    pytest.param(in_onnxruntime(18), id="body in ONNX Runtime, opset 18"),
    pytest.param(in_onnxruntime(20), id="body in ONNX Runtime, opset 20"),
    pytest.param(in_onnxruntime(23), id="body in ONNX Runtime, opset 23"),
    pytest.param(in_onnxruntime(20, kernel=True), id="CPU kernel"),
    pytest.param(in_onnxruntime(20, kernel=True, provider="CUDAExecutionProvider"), id="CUDA kernel", marks=pytest.mark.gpu),
]

# ----------------------------------------------------------------------------
# Tests.


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("op", OPERATORS)
def test_an_operator_matches_its_reference(op: str, dtype: str, implementation: Implementation) -> None:
    for case in CASES[op]:
        inputs = arrays(op, case, dtype)
        wide = tuple(array.astype(np.float32) if array.dtype == np.float16 else array for array in inputs)
        for outputs in (1, 2) if OPERATORS[op].activated else (1,):
            expected = in_torch(op, wide, case.attributes, outputs)
            found = implementation(op, inputs, case.attributes, outputs)
            kind = type_name(OPERATORS[op].output_type, dtype)
            atol, rtol = tolerance(op, kind)
            for one, other in zip(found, expected, strict=True):
                message = f"inputs {[array.shape for array in inputs]}, attributes {dict(case.attributes)}, {outputs} outputs"
                assert (one.dtype, one.shape) == (np.dtype(kind), other.shape), message
                np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), atol=atol, rtol=rtol, err_msg=message)
