"""Normalizations of a traced network as ``scm`` operators, together with the casts, the modulation and the SiLU around them.

torch.onnx translates them into several standard operators, each of which reads and writes the whole feature map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from onnxscript import ir, opset18

from scm_export.graphs.dense_layers import DTYPES
from scm_export.graphs.matching import constant, is_node, only_user, other_input, replace_output, same_shape, silu_of
from scm_export.graphs.translation import add_node, typed
from scm_export.ops.group_norm import GROUP_NORM, GROUP_NORM_MODULATE_SILU, GROUP_NORM_SILU
from scm_export.ops.layer_norm import LAYER_NORM, LAYER_NORM_MODULATE, RMS_NORM

op: Any = opset18  # torch.onnx converts the graph to the requested version afterwards


def norm_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the translation of torch's group norm, for the ``custom_translation_table`` of torch.onnx.export."""
    return {torch.ops.aten.group_norm.default: _group_norm}


def _group_norm(input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True) -> Any:
    channels = input.shape[1]
    scale, shift = (_vector(number, channels) if given is None else _float(given) for given, number in ((weight, 1.0), (bias, 0.0)))
    if input.dtype in DTYPES:
        return add_node(GROUP_NORM, [input, scale, shift], input, input.shape, groups=num_groups, eps=eps)
    # The operator has no other types. ONNX Runtime has no InstanceNormalization of double on the CPU either.
    wide = _float(input)
    return typed(op.CastLike(add_node(GROUP_NORM, [wide, scale, shift], wide, input.shape, groups=num_groups, eps=eps), input), input, input.shape)


def _vector(number: float, count: int) -> Any:
    value = op.Constant(value_floats=[number] * count)
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape([count])
    return value


def _float(value: Any) -> Any:
    if value.dtype == ir.DataType.FLOAT:
        return value
    wide = op.Cast(value, to=ir.DataType.FLOAT)
    wide.dtype, wide.shape = ir.DataType.FLOAT, value.shape
    return wide


def replace_norms(model: ir.Model) -> None:
    """Turn normalizations over the last axis into operators of ``scm``, and merge with them, and with ``GroupNorm``, what can be computed in the same pass.

    These are casts from and to half precision, the modulation ``y * (1 + scale) + shift`` with numbers of each sample, and SiLU. What does not have the
    expected form stays as it is.
    """
    graph = model.graph
    for node in list(graph):
        if node.graph is None:  # merged already
            continue
        if is_node(node, "LayerNormalization"):
            _replace_layer_norm(graph, node)
        elif is_node(node, "ReduceMean"):
            _replace_rms_norm(graph, node)
        elif node.domain == GROUP_NORM.domain and node.op_type == GROUP_NORM.name:
            _merge_into_group_norm(graph, node)


def _merge_into_group_norm(graph: ir.Graph, norm: ir.Node) -> None:
    _, scale, bias = norm.inputs
    source, last = _half_precision(norm)
    attributes = {name: norm.attributes[name].value for name in GROUP_NORM.attributes}
    operator = GROUP_NORM
    inputs: list[ir.Value | None] = [source, scale, bias]
    if (activation := silu_of(last.outputs[0])) is not None:
        operator, last = GROUP_NORM_SILU, activation
    elif (modulated := _modulation(last.outputs[0])) is not None and (activation := silu_of(modulated.last.outputs[0])) is not None:
        columns = _columns(graph, activation, modulated, source)
        if columns is not None:
            operator, inputs, last = GROUP_NORM_MODULATE_SILU, [*inputs, columns], activation
    if last is not norm:
        replace_output(graph, last, operator, inputs, attributes)


def _replace_layer_norm(graph: ir.Graph, norm: ir.Node) -> None:
    x, scale, *rest = norm.inputs
    bias = rest[0] if rest else None
    if x is None or scale is None or x.shape is None or not _is_last_axis(norm, x.shape) or any(value.uses() for value in norm.outputs[1:]):
        return
    source, last = _half_precision(norm)
    if source.dtype not in DTYPES or not isinstance(x.shape[-1], int):
        return
    attributes = {"eps": norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5}
    if (modulated := _modulation(last.outputs[0])) is not None and bias is None and _is_ones(scale):
        n, channels = x.shape[0], x.shape[-1]
        if len(x.shape) == 3 and all(value.dtype == source.dtype and same_shape(value.shape, [n, 1, channels]) for value in (modulated.scale, modulated.shift)):
            replace_output(graph, modulated.last, LAYER_NORM_MODULATE, [source, modulated.scale, modulated.shift], attributes)
            return
    name, channels = last.outputs[0].name, x.shape[-1]
    scale = _float32(graph, last, scale)
    bias = _initializer(graph, f"{name}/bias", np.zeros(channels, np.float32)) if bias is None else _float32(graph, last, bias)
    replace_output(graph, last, LAYER_NORM, [source, scale, bias], attributes)


def _replace_rms_norm(graph: ir.Graph, mean: ir.Node) -> None:
    """Replace ``x / sqrt(mean(x²) + eps) * scale``, which starts at ``mean``."""
    square = mean.inputs[0]
    x = _base_of_square(square)
    if x is None or x.shape is None or not isinstance(x.shape[-1], int) or not _is_mean_of_last_axis(mean, x.shape):
        return
    shifted = only_user(mean.outputs[0], "Add")
    eps = None if shifted is None else constant(other_input(shifted, mean.outputs[0]))
    root = None if shifted is None else only_user(shifted.outputs[0], "Sqrt")
    if root is None or eps is None or eps.size != 1:
        return
    inverse = only_user(root.outputs[0], "Reciprocal")
    quotient = only_user(root.outputs[0], "Div") if inverse is None else only_user(inverse.outputs[0], "Mul")
    if quotient is None or (quotient.inputs[0] is not x and (inverse is None or quotient.inputs[1] is not x)):
        return
    source, normalized = _half_precision(quotient, x)
    scaled = only_user(normalized.outputs[0], "Mul")
    scale = None if scaled is None else other_input(scaled, normalized.outputs[0])
    if scaled is None or scale is None or not same_shape(scale.shape, [x.shape[-1]]):
        return
    # diffusers casts back to half precision before it multiplies by the scale, other networks after it.
    source, last = _half_precision(scaled, x) if normalized is quotient else (source, scaled)
    if source.dtype in DTYPES and last.outputs[0].dtype == source.dtype:
        replace_output(graph, last, RMS_NORM, [source, _float32(graph, last, scale)], {"eps": float(eps.reshape(()))})


# ----------------------------------------------------------------------------
# What surrounds a normalization.


def _half_precision(norm: ir.Node, x: ir.Value | None = None) -> tuple[ir.Value, ir.Node]:
    """The input and the last node of a float32 normalization, with a Cast from a half type and one back to the same type if it has both."""
    wide = norm.inputs[0] if x is None else x
    assert wide is not None
    cast, narrowed = wide.producer(), only_user(norm.outputs[0], "Cast")
    if cast is None or narrowed is None or not is_node(cast, "Cast") or wide.dtype != ir.DataType.FLOAT:
        return wide, norm
    source = cast.inputs[0]
    if source is None or source.dtype is None or source.dtype not in DTYPES or source.dtype != narrowed.outputs[0].dtype:
        return wide, norm
    return source, narrowed


class _Modulation(NamedTuple):
    """``y * (1 + scale) + shift``, computed by ``last``."""

    scale: ir.Value
    shift: ir.Value
    last: ir.Node


def _modulation(y: ir.Value) -> _Modulation | None:
    product = only_user(y, "Mul")
    gain = None if product is None else other_input(product, y)
    sum_ = None if product is None else only_user(product.outputs[0], "Add")
    shift = None if product is None or sum_ is None else other_input(sum_, product.outputs[0])
    producer = gain.producer() if gain is not None else None
    if producer is None or not is_node(producer, "Add") or sum_ is None or shift is None:
        return None
    for scale, one in (producer.inputs, reversed(producer.inputs)):
        number = constant(one)
        if scale is not None and number is not None and number.size == 1 and float(number.reshape(())) == 1:
            return _Modulation(scale, shift, sum_)
    return None


def _columns(graph: ir.Graph, before: ir.Node, modulation: _Modulation, x: ir.Value) -> ir.Value | None:
    """Scale and shift of all channels as one tensor, ``[N, 2 C]``. None if there is not one of each per sample and channel."""
    assert x.shape is not None
    n, channels = x.shape[0], x.shape[1]
    expected = [n, channels, *[1] * (len(x.shape) - 2)]
    parts = (modulation.scale, modulation.shift)
    if any(part.dtype != x.dtype or not same_shape(part.shape, expected) for part in parts):
        return None
    assert isinstance(channels, int)
    split = parts[0].producer()
    if split is not None and is_node(split, "Split") and list(split.outputs) == list(parts) and _axis(split, len(expected)) == 1:
        whole = split.inputs[0]
        assert whole is not None
        producer = whole.producer()
        flat = producer.inputs[0] if producer is not None and is_node(producer, "Unsqueeze") else None
        return flat if flat is not None and same_shape(flat.shape, [n, 2 * channels]) else _flattened(graph, before, whole, 2 * channels)
    joined = ir.Node("", "Concat", [_flattened(graph, before, part, channels) for part in parts], [ir.AttrInt64("axis", 1)])
    return _insert(graph, before, joined, f"{before.outputs[0].name}/modulation", x.dtype, [n, 2 * channels])


def _flattened(graph: ir.Graph, before: ir.Node, value: ir.Value, channels: int) -> ir.Value:
    """``[N, channels, 1, ...]`` as ``[N, channels]``."""
    shape = _initializer(graph, f"{before.outputs[0].name}/{value.name}/shape", np.array([0, channels]))
    assert value.shape is not None
    return _insert(graph, before, ir.Node("", "Reshape", [value, shape]), f"{before.outputs[0].name}/{value.name}", value.dtype, [value.shape[0], channels])


# ----------------------------------------------------------------------------
# Nodes and their parts.


def _insert(graph: ir.Graph, before: ir.Node, node: ir.Node, name: str, dtype: ir.DataType | None, shape: Sequence[Any]) -> ir.Value:
    value = node.outputs[0]
    value.name, value.shape, node.name = name, ir.Shape(shape), f"node_{name}"
    if dtype is not None:
        value.dtype = dtype
    graph.insert_before(before, node)
    return value


def _initializer(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _float32(graph: ir.Graph, before: ir.Node, value: ir.Value) -> ir.Value:
    if value.dtype == ir.DataType.FLOAT:
        return value
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", ir.DataType.FLOAT)])
    return _insert(graph, before, cast, f"{before.outputs[0].name}/{value.name}/wide", ir.DataType.FLOAT, list(value.shape or ()))


def _axis(node: ir.Node, rank: int, default: int = 0) -> int:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else default
    return axis + rank if axis < 0 else axis


def _is_last_axis(norm: ir.Node, shape: ir.Shape) -> bool:
    return _axis(norm, len(shape), -1) == len(shape) - 1


def _is_mean_of_last_axis(mean: ir.Node, shape: ir.Shape) -> bool:
    keeps = mean.attributes["keepdims"].as_int() if "keepdims" in mean.attributes else 1
    axes = constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    return keeps == 1 and axes is not None and axes.size == 1 and int(axes.reshape(())) in (-1, len(shape) - 1)


def _base_of_square(square: ir.Value | None) -> ir.Value | None:
    """x if a value is ``x²``."""
    node = square.producer() if square is not None else None
    if node is None:
        return None
    if is_node(node, "Mul") and node.inputs[0] is node.inputs[1]:
        return node.inputs[0]
    exponent = constant(node.inputs[1]) if is_node(node, "Pow") else None
    return node.inputs[0] if exponent is not None and exponent.size == 1 and float(exponent.reshape(())) == 2 else None


def _is_ones(value: ir.Value) -> bool:
    array = constant(value)
    return array is not None and bool((array == 1).all())
