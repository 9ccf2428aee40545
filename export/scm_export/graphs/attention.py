"""torch's scaled dot-product attention, traced as the ``scm`` operators that compute it without a matrix of scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import ir, opset18

from scm_export.graphs.dense_layers import DTYPES
from scm_export.graphs.matching import constant, is_node, same_shape, same_size
from scm_export.graphs.translation import add_node, typed
from scm_export.ops.attention import ATTENTION, MASKED_ATTENTION, MAX_SIZE

op: Any = opset18  # torch.onnx converts the graph to the requested version afterwards


def attention_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the translation of torch's attention, for the ``custom_translation_table`` of torch.onnx.export."""
    return {torch.ops.aten.scaled_dot_product_attention.default: _translate}


def share_masks(model: ir.Model) -> None:
    """Let the layers of a graph use one constant mask where theirs are equal, as those of causal attention over the same length are."""
    masks: dict[tuple[Any, ...], ir.Value] = {}
    for node in model.graph:
        if node.domain != MASKED_ATTENTION.domain or node.op_type != MASKED_ATTENTION.name:
            continue
        mask = node.inputs[3]
        assert mask is not None
        producer = mask.producer()
        triangle = producer if producer is not None and is_node(producer, "Trilu") else None
        parts = [constant(value) for value in ([mask] if triangle is None else triangle.inputs)]
        if all(part is not None for part in parts):
            upper = None if triangle is None else triangle.attributes.get_int("upper", 1)
            known = (mask.dtype, upper, *((part.shape, part.tobytes()) for part in parts if part is not None))
            node.replace_input_with(3, masks.setdefault(known, mask))


def _translate(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Translate attention over ``[N, heads, L, D]``. What the operators do not support becomes standard ONNX operators.

    Dropout is not applied, as in torch's own translation.
    """
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    mask = _causal_mask(query, key) if is_causal else _additive_mask(attn_mask, query)
    if not _is_supported(query, key, value, mask):
        if enable_gqa:
            key, value = (_repeated(x, query.shape[-3]) for x in (key, value))
        return _standard_attention(query, key, value, mask, factor)
    inputs = [_with_tokens_first(x) for x in (query, key, value)]
    if mask is None:
        operator = ATTENTION
    else:
        operator = MASKED_ATTENTION
        inputs.append(typed(op.Unsqueeze(mask, _ints(range(4 - len(mask.shape)))), mask, _padded(mask.shape)) if len(mask.shape) < 4 else mask)
    return op.Transpose(add_node(operator, inputs, query, [*inputs[0].shape[:3], value.shape[3]], scale=factor), perm=[0, 2, 1, 3])


def _is_supported(query: Any, key: Any, value: Any, mask: Any) -> bool:
    """True if the operators take inputs of these shapes and types. A dynamic size equals another one if they have one name."""
    if query.dtype not in DTYPES or any(len(x.shape) != 4 for x in (query, key, value)):
        return False
    n, heads, length, size = query.shape
    _, key_heads, keys, value_size = value.shape
    static = all(isinstance(number, int) for number in (heads, key_heads, size, value_size))
    if not static or heads % key_heads or max(size, value_size) > MAX_SIZE:
        return False
    if not same_shape(key.shape, [n, key_heads, keys, size]) or not same_size(value.shape[0], n):
        return False
    if mask is None:
        return True
    if len(mask.shape) > 4:
        return False
    *broadcast, last = _padded(mask.shape)
    return same_size(last, keys) and all(given == 1 or same_size(given, wanted) for given, wanted in zip(broadcast, (n, heads, length), strict=True))


def _padded(shape: Sequence[Any]) -> list[Any]:
    return [1] * (4 - len(shape)) + list(shape)


def _with_tokens_first(x: Any) -> Any:
    """``[N, heads, L, D]`` as ``[N, L, heads, D]``. Networks transpose their projections the other way: ONNX Runtime removes both nodes."""
    n, heads, length, size = x.shape
    return typed(op.Transpose(x, perm=[0, 2, 1, 3]), x, [n, length, heads, size])


def _additive_mask(mask: Any, query: Any) -> Any:
    """The mask that is added to the scores, in the type of the query: 0 and -infinity for a Boolean mask."""
    if mask is None:
        return None
    mask = _before_expansion(mask)
    if mask.dtype == ir.DataType.BOOL:
        return typed(op.Where(mask, _scalar(0.0, query), _scalar(-math.inf, query)), query, mask.shape)
    return mask if mask.dtype == query.dtype else typed(op.CastLike(mask, query), query, mask.shape)


def _before_expansion(mask: Any) -> Any:
    """What a mask was expanded from, if that has as many axes: torch expands masks over the queries, and adding broadcasts."""
    node = mask.producer()
    if node is None or not is_node(node, "Expand"):
        return mask
    source = node.inputs[0]
    known = source is not None and source.shape is not None and source.dtype is not None
    return source if known and len(source.shape) == len(mask.shape) and source.shape[-1] == mask.shape[-1] else mask


def _causal_mask(query: Any, key: Any) -> Any:
    """-infinity where the index of a key is greater than that of the query, ``[1, 1, L, S]``, or ``[L, S]`` for tensors of other than four axes."""
    length, keys = (op.Shape(x, start=len(x.shape) - 2, end=len(x.shape) - 1) for x in (query, key))
    outer = [1, 1] if len(query.shape) == 4 else []
    shape = op.Concat(*([_ints(outer)] if outer else []), length, keys, axis=0)
    hidden = op.Trilu(op.Expand(_scalar(-math.inf, query), shape), op.Constant(value_int=1), upper=1)
    return typed(hidden, query, [*outer, query.shape[-2], key.shape[-2]])


def _standard_attention(query: Any, key: Any, value: Any, mask: Any, scale: float) -> Any:
    axes = list(range(len(key.shape)))
    scores = op.MatMul(op.Mul(query, _scalar(scale, query)), op.Transpose(key, perm=[*axes[:-2], axes[-1], axes[-2]]))
    return op.MatMul(op.Softmax(scores if mask is None else op.Add(scores, mask), axis=-1), value)


def _repeated(x: Any, heads: int) -> Any:
    """``[..., key_heads, S, D]`` with each head repeated, so that there are ``heads``."""
    *outer, key_heads, keys, size = x.shape
    copies = op.Expand(op.Unsqueeze(x, _ints([-3])), _ints([*[1] * (len(outer) + 1), heads // key_heads, 1, 1]))
    return typed(op.Reshape(copies, _ints([*[0] * len(outer), heads, -1, size])), x, [*outer, heads, keys, size])


def _scalar(number: float, like: Any) -> Any:
    return typed(op.CastLike(op.Constant(value_float=number), like), like, [])


def _ints(numbers: Sequence[int]) -> Any:
    return op.Constant(value_ints=list(numbers))
