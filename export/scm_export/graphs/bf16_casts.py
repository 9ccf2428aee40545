"""Float32 casts around nodes for which ONNX Runtime has no bfloat16 kernel."""

from __future__ import annotations

from onnxscript import ir

# Standard operators that ONNX Runtime's CUDA provider implements for float32 but not for bfloat16 (docs/OperatorKernels.md of ONNX Runtime). A session with
# such a node does not open, since the CPU provider, its fallback, has no kernel either. The CPU provider lacks nearly all other bfloat16 kernels as well:
# on the CPU the float32 graph is run.
NO_BFLOAT16 = {
    *("Resize", "DepthToSpace", "SpaceToDepth", "Pad", "Clip", "ConvTranspose", "MaxPool", "GlobalAveragePool", "GlobalMaxPool"),
    *("ReduceMean", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSumSquare", "ReduceLogSumExp"),
    *("Sin", "Cos", "Log", "LogSoftmax", "Reciprocal", "Round", "Floor", "Ceil", "Einsum", "CumSum", "TopK", "ArgMax", "ArgMin"),
    *("Elu", "LeakyRelu", "PRelu", "Selu", "Softplus", "Softsign", "InstanceNormalization", "BatchNormalization"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
}


def insert_float32_casts(model: ir.Model) -> None:
    """Cast the bfloat16 inputs of nodes without a bfloat16 kernel to float32, and their results back. Results are rounded once, as by a bfloat16 kernel."""
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
