"""bfloat16 where ONNX Runtime has no kernels for it: such nodes compute in float32, between two casts."""

from __future__ import annotations

from onnxscript import ir

# Operators of standard ONNX that its CUDA provider has in float32 and not in bfloat16 (docs/OperatorKernels.md of ONNX Runtime). A session would not open:
# nor has the CPU provider, to which it falls back. That one lacks nearly all others as well, and runs the float32 graph.
NO_BFLOAT16 = {
    *("Resize", "DepthToSpace", "SpaceToDepth", "Pad", "Clip", "ConvTranspose", "MaxPool", "GlobalAveragePool", "GlobalMaxPool"),
    *("ReduceMean", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSumSquare", "ReduceLogSumExp"),
    *("Sin", "Cos", "Log", "LogSoftmax", "Reciprocal", "Round", "Floor", "Ceil", "Einsum", "CumSum", "TopK", "ArgMax", "ArgMin"),
    *("Elu", "LeakyRelu", "PRelu", "Selu", "Softplus", "Softsign", "InstanceNormalization", "BatchNormalization"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
}


def widen(model: ir.Model) -> None:
    """Put casts to float32 and back round the nodes of a graph that compute in bfloat16 and must not. Rounds once, as a kernel in bfloat16 would."""
    for node in list(model.graph):
        if node.domain or node.op_type not in NO_BFLOAT16:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.BFLOAT16:
                cast = _cast(value, ir.DataType.FLOAT, f"{node.outputs[0].name}/wide{index}")
                model.graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])
        for value in node.outputs:
            if value.dtype == ir.DataType.BFLOAT16:
                uses = list(value.uses())
                cast = _cast(value, ir.DataType.BFLOAT16, f"{value.name}/narrow")
                value.dtype = ir.DataType.FLOAT
                model.graph.insert_after(node, cast)
                for use in uses:
                    use.node.replace_input_with(use.idx, cast.outputs[0])


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    output = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
    return ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], outputs=[output], name=f"node_{name}")
