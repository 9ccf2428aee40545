"""Linear layers and convolutions of a traced network as operators that a processor's matrix units take, for networks that are not of our own operators."""

from __future__ import annotations

import numpy as np
from onnxscript import ir

from scm_export.graphs.functions import INLINE_BELOW
from scm_runtime.bundle.manifest import CHANNELS_FIRST_DOMAIN, CHANNELS_LAST_DOMAIN, OPS_VERSION

# Of the operators: a session that has their kernels refuses nodes of other types.
DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
WORTHWHILE = 16  # channels; the units multiply 32 at once, and fewer are filled up


def replace_dense_layers(model: ir.Model) -> None:
    """Make every product with a stored weight ``scm.channels_last::MatMul``, and every convolution that can be ``scm.channels_first::Conv``.

    Their function bodies are the nodes that they were: where there are no kernels nothing changes.
    """
    for node in list(model.graph):
        dtype = node.outputs[0].dtype
        if node.domain or len(node.inputs) < 2 or dtype is None or dtype not in DTYPES:
            continue
        weight = _weight_shape(node.inputs[1])
        if node.op_type == "MatMul" and weight is not None and len(weight) == 2:
            node.domain, node.version = CHANNELS_LAST_DOMAIN, OPS_VERSION
        elif node.op_type == "Conv" and weight is not None and _is_plain(node, weight):
            node.domain, node.version = CHANNELS_FIRST_DOMAIN, OPS_VERSION
            node.attributes.clear()
            node.attributes["pads"] = ir.AttrInt64s("pads", [weight[2] // 2] * 4)
            if len(node.inputs) < 3 or node.inputs[2] is None:
                node.resize_inputs(3)
                node.replace_input_with(2, _zeros(model.graph, f"{node.outputs[0].name}/bias", weight[0], dtype))


def _weight_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a large initializer, also behind a Cast."""
    producer = value.producer() if value is not None else None
    if producer is not None:
        return _weight_shape(producer.inputs[0]) if producer.op_type == "Cast" and not producer.domain else None
    if value is None or not value.is_initializer() or value.const_value is None or value.const_value.nbytes < INLINE_BELOW:
        return None
    return tuple(value.const_value.shape.numpy())


def _is_plain(node: ir.Node, weight: tuple[int, ...]) -> bool:
    """Whether a convolution has a window of 3x3 or 1x1, moves by one, has one group, and keeps the map's size with zeros round it."""
    if len(weight) != 4 or weight[2:] not in ((1, 1), (3, 3)) or min(weight[:2]) < WORTHWHILE:
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
    """A bias for a convolution without one."""
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([count]), const_value=ir.tensor(np.zeros(count, dtype.numpy()), dtype, name))
    graph.register_initializer(value)
    return value
