"""For networks that were written for float32 and any batch: operands of unlike dtypes are brought to one, as torch.autocast does, and the waves of a time
embedding do not depend on a sample's place in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

# By the name of torch's function, with or without the namespace and the overload: a program calls aten.linear.default.
WEIGHTED = {"linear", "bilinear", "convolution", "prelu"} | {f"conv{way}{n}d" for way in ("", "_transpose") for n in (1, 2, 3)}
"""What takes the dtype of its weight, the second argument."""
PRODUCTS = {
    *("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "inner", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "tensordot"),
    *("scaled_dot_product_attention", "multi_head_attention_forward", "grid_sample", "grid_sampler", "lerp", "cdist"),
}
"""What takes the narrowest dtype of its operands."""
NORMS = {
    *("layer_norm", "group_norm", "rms_norm", "batch_norm", "instance_norm", "local_response_norm", "normalize", "cosine_similarity"),
    *("native_layer_norm", "native_group_norm", "native_batch_norm"),
}
"""What divides by a sum of squares: computed in float32, the result in the dtype of the first operand."""
WAVES = {"sin", "cos"}
"""Computed in float64 where they are of levels, one number or one row a sample: ONNX Runtime's float32 sine differs in the last bit between the vectorised
part of a tensor and its rest."""


class MatchDtypes(TorchFunctionMode):
    """Within it, torch's functions accept floating tensors of different dtypes."""

    def __torch_function__(self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if _is_floating(leaf)]
        if name in WAVES and len(operands) == 1 and operands[0].ndim <= 2 and operands[0].dtype == torch.float32:
            return func(operands[0].double()).float()
        if not operands or name not in WEIGHTED | PRODUCTS | NORMS:
            return func(*args, **kwargs)
        dtypes = [operand.dtype for operand in operands]
        if name in NORMS:
            return _cast(func(*_cast(args, torch.float32), **_cast(kwargs, torch.float32)), dtypes[0])
        weight = (args[1] if len(args) > 1 else kwargs.get("weight")) if name in WEIGHTED else None
        dtype = weight.dtype if isinstance(weight, Tensor) else min(dtypes, key=lambda dtype: dtype.itemsize)
        return func(*_cast(args, dtype), **_cast(kwargs, dtype))


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda leaf: leaf.to(dtype) if _is_floating(leaf) else leaf, values)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
