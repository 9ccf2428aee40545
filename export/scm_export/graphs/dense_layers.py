"""Linear layers and convolutions of a traced network as ``scm`` operators, whose native kernels use a processor's matrix units."""

from __future__ import annotations

import numpy as np
from onnxscript import ir

from scm_export.graphs.functions import INLINE_BELOW
from scm_runtime.bundle.manifest import CHANNELS_FIRST_DOMAIN, CHANNELS_LAST_DOMAIN, OPS_VERSION

# Supported by the operators: a session with their kernels rejects nodes of other types.
DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
MIN_CHANNELS = 16  # matrix units multiply 32 channels at once; fewer are padded


def replace_dense_layers(model: ir.Model) -> None:
    """Turn every MatMul by a stored weight into ``scm.channels_last::MatMul``, and supported convolutions into ``scm.channels_first::Conv``.

    Their function bodies contain the original node: without the kernels nothing changes.
    """
    for node in list(model.graph):
        dtype = node.outputs[0].dtype
        if node.domain or len(node.inputs) < 2 or dtype is None or dtype not in DTYPES:
            continue
        weight = _weight_shape(node.inputs[1])
        if node.op_type == "MatMul" and weight is not None and len(weight) == 2:
            node.domain, node.version = CHANNELS_LAST_DOMAIN, OPS_VERSION
        elif node.op_type == "Conv" and weight is not None and _is_supported(node, weight):
            node.domain, node.version = CHANNELS_FIRST_DOMAIN, OPS_VERSION
            node.attributes.clear()
            node.attributes["pads"] = ir.AttrInt64s("pads", [weight[2] // 2] * 4)
            if len(node.inputs) < 3 or node.inputs[2] is None:
                node.resize_inputs(3)
                node.replace_input_with(2, _zeros(model.graph, f"{node.outputs[0].name}/bias", weight[0], dtype))


def _weight_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Shape of the large initializer that a value is, or is the Cast of; None if there is none."""
    producer = value.producer() if value is not None else None
    if producer is not None:
        return _weight_shape(producer.inputs[0]) if producer.op_type == "Cast" and not producer.domain else None
    if value is None or not value.is_initializer() or value.const_value is None or value.const_value.nbytes < INLINE_BELOW:
        return None
    return tuple(value.const_value.shape.numpy())


def _is_supported(node: ir.Node, weight: tuple[int, ...]) -> bool:
    """True for a 2D convolution with kernel size 1 or 3, stride, dilation and groups of 1, and zero padding that keeps the size of the feature map."""
    if len(weight) != 4 or weight[2:] not in ((1, 1), (3, 3)) or min(weight[:2]) < MIN_CHANNELS:
        return False
    attributes = node.attributes
    pad = weight[2] // 2
    usual = {"pads": [pad] * 4, "strides": [1, 1], "dilations": [1, 1], "kernel_shape": [*weight[2:]]}
    given = {name: list(attributes[name].as_ints()) for name in usual if name in attributes}
    has_pads = "pads" in given or pad == 0
    return (
        has_pads
        and all(given[name] == usual[name] for name in given)
        and ("group" not in attributes or attributes["group"].as_int() == 1)
        and ("auto_pad" not in attributes or attributes["auto_pad"].as_string() == "NOTSET")
    )


def _zeros(graph: ir.Graph, name: str, count: int, dtype: ir.DataType) -> ir.Value:
    """A new initializer of ``count`` zeros: the bias of a convolution that has none."""
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([count]), const_value=ir.tensor(np.zeros(count, dtype.numpy()), dtype, name))
    graph.register_initializer(value)
    return value
