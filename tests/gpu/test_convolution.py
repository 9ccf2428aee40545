"""The convolution operators on a GPU, alone and with what follows them, against their PyTorch references in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor

from scm_export import ops
from scm_export.graphs.build import ir_version
from scm_export.ops import OPERATORS
from scm_export.verification.tolerances import OP_TOLERANCE
from scm_runtime.bundle.manifest import OPS_VERSION
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.ort.options import CONVOLUTION
from support import native_library, on_stub

pytestmark = pytest.mark.gpu

OPSET = 20
BALANCE = {"t": 0.3, "clip": 1.5}
TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Case:
    """One use of an operator, named as in OPERATORS, with the shapes of its inputs."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    attributes: dict[str, Any]
    reference: Callable[..., Tensor]

    def __str__(self) -> str:
        return f"{self.op} {' '.join('x'.join(map(str, shape)) for shape in self.shapes)}"


def convolutions() -> list[Case]:
    """The maps of EDM2's networks, with the first and last layer's channels, odd sizes, and sums that are split."""
    sizes = [
        (2, 64, 64, 5, 64),
        (2, 64, 64, 64, 4),
        (1, 64, 64, 192, 192),
        (3, 32, 32, 384, 128),
        (1, 16, 16, 1344, 192),
        (2, 8, 8, 512, 1792),
        (3, 7, 5, 24, 40),
    ]
    cases = []
    for n, h, w, i, o in sizes:
        x, weight, y = (n, h, w, i), (o, i, 3, 3), (n, h, w, o)
        begin, end = 8, 8 + o
        columns = {"begin": [begin], "end": [end]}
        cases += [
            Case("scm.channels_last::Conv3x3", (x, weight), {}, ops.conv3x3),
            Case(
                "scm.fused::Conv3x3ModulateSiLU",
                (x, weight, (n, o + 24)),
                columns,
                lambda x, w, scales, begin=begin, end=end: ops.conv3x3_modulate_silu(x, w, scales, begin, end),
            ),
            Case("scm.fused::Conv3x3MPSum", (x, weight, y), BALANCE, lambda x, w, skip: ops.conv3x3_mp_sum(x, w, skip, **BALANCE)),
        ]
    return cases


def others() -> list[Case]:
    products = [((2, 64, 64, 192), 192), ((1, 16, 16, 1344), 1344), ((3, 8, 8, 24), 40), ((3, 65), 33)]
    columns = {"begin": [8], "end": [8 + 2 * 96], "eps": 1e-4}

    def product(x: Tensor, w: Tensor, skip: Tensor) -> Tensor:
        return ops.matmul_mp_sum(x, w.t(), skip, **BALANCE)

    def modulated(y: Tensor, modulation: Tensor) -> Tensor:
        return ops.norm_modulate_silu_columns(y, modulation, 8, 8 + 2 * 96)

    return [
        *(Case("scm.fused::MatMulMPSum", (x, (x[-1], o), (*x[:-1], o)), BALANCE, product) for x, o in products),
        Case("scm.fused::NormModulateSiLU", ((3, 16, 16, 96), (3, 300)), columns, modulated),
    ]


def model(case: Case, dtype: str, arrays: list[NDArray[np.float32]], *, constant_weight: bool) -> ModelProto:
    """Return a graph whose inputs and output are float32, around one node that computes in ``dtype``. The batch is dynamic, as in exported graphs."""
    operator = OPERATORS[case.op]
    names = list(operator.inputs)
    constant = {names[1]} if constant_weight and "w" in operator.inputs else set()
    nodes = [helper.make_node("Cast", [name], [f"{name}_T"], to=TYPES[dtype]) for name in names]
    node = helper.make_node(operator.name, [f"{name}_T" for name in names], ["result_T"], domain=operator.domain)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in case.attributes.items())
    nodes += [node, helper.make_node("Cast", ["result_T"], ["result"], to=TensorProto.FLOAT)]
    given = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [*array.shape] if name == "w" else ["batch", *array.shape[1:]])
        for name, array in zip(names, arrays, strict=True)
        if name not in constant
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in zip(names, arrays, strict=True) if name in constant]
    graph = helper.make_graph(nodes, operator.name, given, [helper.make_tensor_value_info("result", TensorProto.FLOAT, None)], weights)
    operators = [operator, *operator.calls]
    domains = dict.fromkeys(["scm", *(each.domain for each in operators)])
    return helper.make_model(
        graph,
        functions=[each.function(OPSET, arrays[0].ndim) for each in operators],
        opset_imports=[helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, OPS_VERSION) for domain in domains)],
        ir_version=ir_version(OPSET),
    )


def computed(case: Case, dtype: str, arrays: list[NDArray[np.float32]], *, constant_weight: bool = True, own: bool = True) -> NDArray[np.float32]:
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if own:
        options.add_session_config_entry(CONVOLUTION, "own")
    options.register_custom_ops_library(str(native_library()))
    graph = model(case, dtype, arrays, constant_weight=constant_weight).SerializeToString()
    session = ort.InferenceSession(graph, options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    names = {given.name for given in session.get_inputs()}
    feeds = {name: array for name, array in zip(OPERATORS[case.op].inputs, arrays, strict=True) if name in names}
    result: NDArray[np.float32] = session.run(None, feeds)[0]
    return result


def inputs(case: Case, dtype: str) -> list[NDArray[np.float32]]:
    """Return normally distributed inputs that ``dtype`` holds exactly. Weights are scaled so that products with them are of order 1."""
    generator = torch.Generator().manual_seed(0)
    arrays = []
    for index, shape in enumerate(case.shapes):
        values = torch.randn(shape, generator=generator)
        if index == 1 and "w" in OPERATORS[case.op].inputs:
            values /= math.sqrt(math.prod(shape[1:]) if len(shape) == 4 else shape[0])
        arrays.append(values.to(getattr(torch, dtype)).float().numpy())
    return arrays


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", [*convolutions(), *others()], ids=str)
def test_agrees_with_the_reference(case: Case, dtype: str) -> None:
    arrays = inputs(case, dtype)
    expected = case.reference(*(torch.from_numpy(array) for array in arrays)).numpy()
    found = computed(case, dtype, arrays)
    assert found.shape == expected.shape
    if not on_stub():
        atol, rtol = OP_TOLERANCE[dtype]
        np.testing.assert_allclose(found, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("case", convolutions()[-3:], ids=str)
def test_weights_that_are_not_constant_give_the_same_bits(case: Case) -> None:
    arrays = inputs(case, "float16")
    found, other = computed(case, "float16", arrays), computed(case, "float16", arrays, constant_weight=False)
    assert on_stub() or np.array_equal(found, other)


@pytest.mark.parametrize("case", [case for case in convolutions() if case.shapes[0][0] > 1], ids=str)
def test_a_sample_does_not_depend_on_its_batch(case: Case) -> None:
    arrays = inputs(case, "float16")
    whole = computed(case, "float16", arrays)
    for sample in range(len(whole)):
        alone = computed(case, "float16", [array if index == 1 else array[sample : sample + 1] for index, array in enumerate(arrays)])
        assert on_stub() or np.array_equal(alone[0], whole[sample])


def test_without_the_entry_the_function_bodies_run() -> None:
    case = convolutions()[0]
    arrays = inputs(case, "float16")
    found, body = computed(case, "float16", arrays), computed(case, "float16", arrays, own=False)
    assert found.shape == body.shape
    atol, rtol = OP_TOLERANCE["float16"]
    assert on_stub() or np.allclose(found, body, atol=2 * atol, rtol=2 * rtol)
