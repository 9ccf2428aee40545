"""bfloat16 graphs run operators without a bfloat16 kernel in float32, with the same result."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto, shape_inference
from onnxscript import ir
from torch import Tensor, nn

from scm_export.graphs.bf16_casts import NO_BFLOAT16
from scm_export.graphs.trace import trace_map
from scm_export.precision import Precision
from scm_export.verification.bf16_emulation import emulate_bf16
from scm_runtime.common.load_onnxruntime import load_onnxruntime

onnxruntime = load_onnxruntime()


class Resampling(nn.Module):
    """Operators of U-Nets and autoencoders between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        y = nn.functional.pixel_shuffle(self.conv(y), 2).clamp(-1, 1)
        mean: Tensor = y.unflatten(1, (-1, 2)).mean(dim=2)[:, :, :, :1]
        return nn.functional.pad(y, (1, 0)) - mean


def test_operators_without_a_bfloat16_kernel_compute_in_float32() -> None:
    torch.manual_seed(0)
    network = Precision(Resampling())
    network.compute_dtype = torch.bfloat16
    x = torch.randn(3, 4, 3, 5)
    proto = ir.to_proto(trace_map("resampling", network, x, "x", "y", 22))
    onnx.checker.check_model(proto, full_check=True)
    inferred = shape_inference.infer_shapes(proto, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.input, *inferred.output)}
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    found = {node.op_type for node in inferred.node}
    assert {"Resize", "DepthToSpace", "Clip", "Pad", "ReduceMean"} <= found & NO_BFLOAT16
    for node in inferred.node:
        half = [name for name in (*node.input, *node.output) if types.get(name) == TensorProto.BFLOAT16]
        assert node.op_type not in NO_BFLOAT16 or not half, node
        assert node.op_type != "Conv" or len(half) == 4  # still in bfloat16, with its weights

    session = onnxruntime.InferenceSession(emulate_bf16(proto).SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = network(x).numpy()
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, atol=2e-2)
    assert expected.std() > 0.1
