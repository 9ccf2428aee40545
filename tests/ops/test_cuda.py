"""The CUDA kernels on a GPU, in addition to test_operators.py: bfloat16, large attention, CUDA graphs, torch's noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from scm_export import ops
from scm_export.verification.tolerances import OP_TOLERANCE
from scm_runtime.bundle.manifest import OPS_DOMAIN, OPS_VERSION
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from support import native_library

onnxruntime = load_onnxruntime()

pytestmark = pytest.mark.gpu

ELEMENTS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.uint8: TensorProto.UINT8,
}


Run = Callable[[], None]


def kernel(op: str, inputs: tuple[Tensor, ...], like: tuple[Tensor, ...], *, graph: bool = False, **attributes: Any) -> tuple[Run, tuple[Tensor, ...]]:
    """Create a session with one node, bound to CUDA inputs and to outputs shaped like ``like``. Returns a function that runs it, and the outputs."""
    names, results = [f"i{k}" for k in range(len(inputs))], [f"o{k}" for k in range(len(like))]
    given = [helper.make_tensor_value_info(name, ELEMENTS[x.dtype], list(x.shape)) for name, x in zip(names, inputs, strict=True)]
    asked = [helper.make_tensor_value_info(name, ELEMENTS[x.dtype], list(x.shape)) for name, x in zip(results, like, strict=True)]
    node = helper.make_node(op, names, results, domain=OPS_DOMAIN)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(OPS_DOMAIN, OPS_VERSION)]
    model = helper.make_model(helper.make_graph([node], op, given, asked), opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(native_library()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[("CUDAExecutionProvider", {"enable_cuda_graph": str(int(graph))})])
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    outputs = tuple(torch.empty_like(x) for x in like)
    binding = session.io_binding()
    for name, x in zip(names, inputs, strict=True):
        binding.bind_input(name, "cuda", 0, ELEMENTS[x.dtype], tuple(x.shape), x.data_ptr())
    for name, x in zip(results, outputs, strict=True):
        binding.bind_output(name, "cuda", 0, ELEMENTS[x.dtype], tuple(x.shape), x.data_ptr())

    def run() -> None:
        torch.cuda.synchronize()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run, outputs


def assert_close(found: Tensor, expected: Tensor) -> None:
    atol, rtol = OP_TOLERANCE[str(found.dtype).removeprefix("torch.")]
    torch.testing.assert_close(found.float(), expected.float(), atol=atol, rtol=rtol)


CASES: dict[str, tuple[list[tuple[int, ...]], dict[str, Any], Callable[..., Tensor | tuple[Tensor, Tensor]]]] = {
    "PixelNorm": ([(3, 7, 5, 65)], {"eps": 1e-4}, ops.pixel_norm_silu),
    "MPSiLU": ([(3, 7, 5, 64)], {}, ops.mp_silu),
    "MPSum": ([(3, 7, 5, 64), (3, 7, 5, 64)], {"t": 0.3, "clip": 256.0}, ops.mp_sum_silu),
    "MPCat": ([(3, 7, 5, 64), (3, 7, 5, 24)], {"t": 0.5}, ops.mp_cat_silu),
    "ModulateSiLU": ([(3, 7, 5, 64), (3, 64)], {}, ops.modulate_silu),
    "NormModulateSiLU": ([(3, 16, 16, 448), (3, 896)], {"eps": 1e-4}, ops.norm_modulate_silu),
    "CosineAttention": ([(3, 77, 3 * 128)], {"heads": 2, "eps": 1e-4}, ops.cosine_attention),
    "Attention": ([(3, 77, 4, 40), (3, 130, 2, 40), (3, 130, 2, 40)], {"scale": 0.16}, ops.attention),
    "MaskedAttention": ([(3, 77, 4, 64), (3, 20, 4, 64), (3, 20, 4, 64), (3, 1, 1, 20)], {"scale": 0.125}, ops.attention),
    "ReLULinearAttention": ([(3, 77, 64)] * 3, {"heads": 4, "eps": 1e-15}, ops.relu_linear_attention),
    "DepthwiseGLU": ([(3, 48, 17, 18), (48, 1, 3, 3), (48,)], {}, ops.depthwise_glu),
    "GEGLU": ([(3, 77, 256), (256,)], {}, ops.geglu),
    "GroupNorm": ([(3, 24, 17, 18), (24,), (24,)], {"groups": 8, "eps": 1e-5}, ops.group_norm),
    "GroupNormSiLU": ([(2, 8, 160, 128), (8,), (8,)], {"groups": 2, "eps": 1e-5}, ops.group_norm_silu),  # a group is several parts
    "GroupNormModulateSiLU": ([(3, 24, 17, 18), (24,), (24,), (3, 48)], {"groups": 8, "eps": 1e-5}, ops.group_norm_modulate_silu),
    "LayerNorm": ([(3, 77, 320), (320,), (320,)], {"eps": 1e-5}, ops.layer_norm),
    "LayerNormModulate": ([(3, 77, 1152), (3, 1, 1152), (3, 1, 1152)], {"eps": 1e-6}, ops.layer_norm_modulate),
    "RMSNorm": ([(3, 77, 2240), (2240,)], {"eps": 1e-6}, ops.rms_norm),
    "ToImage": ([(3, 3, 33, 65)], {"scale": 64.0, "offset": 127.5}, ops.to_image),
}


FLOAT_INPUTS = {"GroupNorm": (1, 2), "GroupNormSiLU": (1, 2), "GroupNormModulateSiLU": (1, 2), "LayerNorm": (1, 2), "RMSNorm": (1,)}
"""The inputs that are float32 whatever the type of the node, by index."""


@pytest.mark.parametrize("op", CASES)
def test_bfloat16(op: str) -> None:
    torch.manual_seed(0)
    shapes, attributes, reference = CASES[op]
    dtypes = [torch.float32 if index in FLOAT_INPUTS.get(op, ()) else torch.bfloat16 for index in range(len(shapes))]
    inputs = tuple(torch.randn(shape, device="cuda").to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    expected = reference(*(x.float() for x in inputs), **attributes)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    run, outputs = kernel(op, inputs, tuple(x if x.dtype == torch.uint8 else x.bfloat16() for x in wanted), **attributes)
    run()
    for one, other in zip(outputs, wanted, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "length", "heads"), [(1, 64, 1), (1, 1024, 6), (8, 256, 20), (2, 1000, 32)])
def test_attention_of_the_networks(dtype: torch.dtype, n: int, length: int, heads: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(n, length, 3 * 64 * heads, device="cuda").to(dtype)
    expected = ops.cosine_attention(qkv.float(), heads)
    run, (found,) = kernel("CosineAttention", (qkv,), (expected.to(dtype),), heads=heads, eps=1e-4)
    run()
    assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "length", "keys", "size"), [(1, 4096, 77, 40), (2, 1024, 1024, 80), (8, 256, 256, 16), (1, 64, 64, 160), (1, 300, 300, 128)])
def test_attention_of_diffusers_networks(dtype: torch.dtype, n: int, length: int, keys: int, size: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, tokens, 8, size, device="cuda").to(dtype) for tokens in (length, keys, keys))
    expected = ops.attention(q.float(), k.float(), v.float(), scale=size**-0.5)
    run, (found,) = kernel("Attention", (q, k, v), (expected.to(dtype),), scale=size**-0.5)
    run()
    assert_close(found, expected)


def test_a_kernel_can_be_captured_in_a_cuda_graph() -> None:
    a, b = (torch.randn(1, 16, 16, 64, device="cuda") for _ in range(2))
    run, (found,) = kernel("MPSum", (a, b), (a,), graph=True, t=0.3, clip=256.0)
    for _ in range(4):  # ONNX Runtime warms up, captures, and replays
        run()
    a.copy_(torch.randn_like(a))
    run()
    assert_close(found, ops.mp_sum(a, b, 0.3, 256.0))


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3])
def test_noise_matches_torch_on_cuda(seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    seeds, scale = torch.tensor([seed], device="cuda"), torch.ones((), device="cuda")
    for draw in range(3):
        expected = torch.randn(1, 4, 64, 64, device="cuda", generator=generator)
        run, (found,) = kernel("PhiloxNormal", (seeds, torch.tensor(draw, device="cuda"), scale), (expected,), shape=[4, 64, 64])
        run()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
