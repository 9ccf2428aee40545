"""Parts of transformer blocks in traced networks as ``scm`` operators: gated feed-forward layers, and SANA's linear attention."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import ir

from scm_export.graphs.dense_layers import DTYPES
from scm_export.graphs.matching import constant, is_node, only_user, other_input, replace_output, same_shape
from scm_export.ops.depthwise_glu import DEPTHWISE_GLU
from scm_export.ops.geglu import GEGLU
from scm_export.ops.operator import Operator
from scm_export.ops.relu_linear_attention import MAX_HEAD_SIZE, RELU_LINEAR_ATTENTION


def replace_transformer_blocks(model: ir.Model) -> None:
    """Turn the computations that :data:`PATTERNS` describe into ``scm`` operators. What differs from a pattern in any detail stays as it is.

    The function bodies of the operators contain the same computations. Nodes whose results are no longer used are left in the graph.
    """
    for node in list(model.graph):
        match = PATTERNS.get(node.op_type) if not node.domain else None
        found = match(node) if match is not None else None
        if found is not None:
            replace_output(model.graph, *found)


Match = tuple[ir.Node, Operator, Sequence[ir.Value], dict[str, int | float]]
"""The node that computes the result, and the operator that replaces it, with its inputs and attributes."""


# -- GEGLU: Mul(a, Gelu(g)) with a, g = Split(Add(product, bias)) ------------------------------------------------------------------


def _geglu(gelu: ir.Node) -> Match | None:
    product = only_user(gelu.outputs[0], "Mul")
    split = _producer(gelu.inputs[0], "Split")
    if product is None or split is None or ("approximate" in gelu.attributes and gelu.attributes["approximate"].as_string() != "none"):
        return None
    biased = _halves(split, axis=-1)
    if biased is None or other_input(product, gelu.outputs[0]) is not split.outputs[0] or gelu.inputs[0] is not split.outputs[1] or not _private(split.outputs):
        return None
    add = _producer(biased, "Add")
    if add is None or not _private([biased]):
        return None
    for x, b in (add.inputs, reversed(add.inputs)):
        if x is not None and b is not None and same_shape(x.shape, list(biased.shape or ())) and _sizes(b) == [_sizes(biased)[-1]] and _supported(biased):
            return product, GEGLU, [x, b], {}
    return None


# -- DepthwiseGLU: Mul(a, SiLU(g)) with a, g = Split(Conv(SiLU(x))), one channel per group ----------------------------------------------


def _depthwise_glu(conv: ir.Node) -> Match | None:
    x, split = _silu_of(conv.inputs[0]), only_user(conv.outputs[0], "Split")
    weight = conv.inputs[1]
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    if x is None or split is None or weight is None or bias is None or not _supported(x) or not _is_depthwise(conv, _sizes(weight)):
        return None
    if _halves(split, axis=1) is None or split.outputs[0].is_graph_output():
        return None
    gated = only_user(split.outputs[0], "Mul")
    if gated is None or _silu_of(other_input(gated, split.outputs[0])) is not split.outputs[1] or len(split.outputs[1].uses()) != 2:
        return None
    return gated, DEPTHWISE_GLU, [x, weight, bias], {}


def _is_depthwise(conv: ir.Node, weight: list[int | None]) -> bool:
    """True for a 3x3 convolution with one channel per group, stride and dilation of 1, and zero padding that keeps the size of the feature map."""
    if len(weight) != 4 or weight[0] is None or weight[1:] != [1, 3, 3]:
        return False
    expected = {"group": weight[0], "pads": [1] * 4, "strides": [1, 1], "dilations": [1, 1], "kernel_shape": [3, 3], "auto_pad": "NOTSET"}
    attributes = {name: _plain(attribute) for name, attribute in conv.attributes.items()}
    return {**expected, **attributes} == expected and {"group", "pads"} <= attributes.keys()


def _silu_of(value: ir.Value | None) -> ir.Value | None:
    """Return x if a value is x * sigmoid(x) and is used once."""
    product = _producer(value, "Mul")
    if product is None or value is None or not _private([value]):
        return None
    for x, gate in (product.inputs, reversed(product.inputs)):
        sigmoid = _producer(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x and gate is not None and _private([gate]):
            return x
    return None


# -- ReLULinearAttention: SanaLinearAttnProcessor2_0 of diffusers ------------------------------------------------------------------------


def _relu_linear_attention(div: ir.Node) -> Match | None:
    numerator, total = _producer(div.inputs[0], "Slice"), _producer(div.inputs[1], "Add")
    sums = _producer(total.inputs[0], "Slice") if total is not None else None
    eps = constant(total.inputs[1]) if total is not None else None
    if numerator is None or sums is None or eps is None or eps.size != 1:
        return None
    result = numerator.inputs[0]
    if result is None or sums.inputs[0] is not result or _slice(numerator) != (0, -1, 2, 1) or _slice(sums) != (-1, 2**63 - 1, 2, 1):
        return None
    product = _producer(result, "MatMul")  # [heads, head_size + 1, L]
    state = _producer(product.inputs[0], "MatMul") if product is not None else None
    pad = _producer(state.inputs[0], "Pad") if state is not None else None
    if product is None or state is None or pad is None or not _appends_ones(pad):
        return None
    q, k, v = _by_head(product.inputs[1], relu=True), _by_head(state.inputs[1], relu=True, transposed=True), _by_head(pad.inputs[0])
    merged = only_user(div.outputs[0], "Reshape")
    turned = only_user(merged.outputs[0], "Transpose") if merged is not None else None
    if q is None or k is None or v is None or turned is None or _perm(turned) != [0, 2, 1]:
        return None
    last, heads = turned, q[1]
    if any(other[1] != heads for other in (k, v)) or any(not same_shape(other[0].shape, list(q[0].shape or ())) for other in (k, v)) or not _supported(q[0]):
        return None
    if q[0].dtype != ir.DataType.FLOAT:  # computed in float32, as the operator does
        cast = only_user(last.outputs[0], "Cast")
        if cast is None or cast.outputs[0].dtype != q[0].dtype:
            return None
        last = cast
    sizes = _sizes(q[0])
    if sizes != _sizes(last.outputs[0]) or sizes[2] is None or sizes[2] > MAX_HEAD_SIZE * heads:
        return None
    return last, RELU_LINEAR_ATTENTION, [q[0], k[0], v[0]], {"heads": heads, "eps": float(eps.item())}


def _by_head(value: ir.Value | None, *, relu: bool = False, transposed: bool = False) -> tuple[ir.Value, int] | None:
    """Return x, [N, L, C], and the number of heads, if a value is x per head, [N, heads, C / heads, L], perhaps transposed, after a ReLU, in float32."""
    cast = _producer(value, "Cast")
    value = cast.inputs[0] if cast is not None else value
    if relu:
        node = _producer(value, "Relu")
        value = node.inputs[0] if node is not None else None
    if transposed:
        node = _producer(value, "Transpose")
        value = node.inputs[0] if node is not None and _perm(node) == [0, 1, 3, 2] else None
    reshape = _producer(value, "Reshape")
    turned = _producer(reshape.inputs[0], "Transpose") if reshape is not None else None
    x = turned.inputs[0] if turned is not None and _perm(turned) == [0, 2, 1] else None
    if x is None or value is None or len(_sizes(x)) != 3 or len(_sizes(value)) != 4:
        return None
    (_, length, channels), (_, heads, head_size, tokens) = _sizes(x), _sizes(value)
    if heads is None or head_size is None or channels != heads * head_size or length is None or tokens != length:
        return None
    return x, heads


def _slice(node: ir.Node) -> tuple[int, ...]:
    """Return start, end, axis and step of a Slice along one axis."""
    found = [constant(value) for value in node.inputs[1:]]
    return tuple(int(array.item()) for array in found if array is not None and array.size == 1)


def _appends_ones(pad: ir.Node) -> bool:
    """True for a Pad of four axes that appends a row of ones to the third one."""
    pads, value = constant(pad.inputs[1]), constant(pad.inputs[2]) if len(pad.inputs) == 3 else None
    is_constant = "mode" not in pad.attributes or pad.attributes["mode"].as_string() == "constant"
    return is_constant and pads is not None and pads.tolist() == [0, 0, 0, 0, 0, 0, 1, 0] and value is not None and value.size == 1 and value.item() == 1


# -- Values and nodes -----------------------------------------------------------------------------------------------------------------


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node that computes a value, if it is of the given standard type."""
    node = value.producer() if value is not None else None
    return node if node is not None and is_node(node, op_type) else None


def _private(values: Sequence[ir.Value]) -> bool:
    """True if each value is used once, in the graph."""
    return all(len(value.uses()) == 1 and not value.is_graph_output() for value in values)


def _halves(split: ir.Node, axis: int) -> ir.Value | None:
    """Return the input of a Split into two equal parts along an axis."""
    x = split.inputs[0]
    sizes = [_sizes(value) for value in (x, *split.outputs)]
    if x is None or len(split.outputs) != 2 or not all(sizes) or split.attributes.get_int("axis", 0) not in (axis, axis % len(sizes[0])):
        return None
    whole, first, second = (each[axis] for each in sizes)
    return x if whole is not None and first is not None and first == second and whole == 2 * first else None


def _perm(transpose: ir.Node) -> list[int]:
    return list(transpose.attributes["perm"].as_ints()) if "perm" in transpose.attributes else []


def _sizes(value: ir.Value | None) -> list[int | None]:
    """The sizes of a value's axes, None for dynamic ones; empty if their number is unknown."""
    if value is None or value.shape is None:
        return []
    return [size if isinstance(size, int) else None for size in value.shape]


def _supported(value: ir.Value) -> bool:
    return value.dtype in DTYPES


def _plain(attribute: ir.Attr) -> object:
    return list(attribute.value) if isinstance(attribute.value, Sequence) and not isinstance(attribute.value, str) else attribute.value


PATTERNS = {"Gelu": _geglu, "Conv": _depthwise_glu, "Div": _relu_linear_attention}
"""The functions that match a pattern, by the type of the standard node that they start from."""
