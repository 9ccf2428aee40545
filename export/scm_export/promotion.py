"""``PromoteDtypes``: type promotion for networks that were written for float32 only.

Operands of different dtypes are cast to one dtype, as torch.autocast does, and time embeddings give the same result for a sample wherever it is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from scm_export.errors import ExportError
from scm_export.user_code import running_line

# Names of torch's functions, without namespace and overload: an exported program calls aten.linear.default.
WEIGHTED = {"linear", "bilinear", "convolution", "prelu"} | {f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)}
"""Functions that compute in the dtype of their weight, the second argument."""
PRODUCTS = {
    *("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "inner", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "tensordot"),
    *("scaled_dot_product_attention", "multi_head_attention_forward", "grid_sample", "grid_sampler", "lerp", "cdist"),
}
"""Functions that compute in the narrowest dtype of their operands."""
NORMS = {
    *("layer_norm", "group_norm", "rms_norm", "batch_norm", "instance_norm", "local_response_norm", "normalize", "cosine_similarity"),
    *("native_layer_norm", "native_group_norm", "native_batch_norm"),
}
"""Functions that divide by a sum of squares. They compute in float32; the result has the dtype of the first operand."""
WAVES = {"sin", "cos"}
"""Functions that compute in float64 if their operand is one number or one row per sample. ONNX Runtime's float32 sine differs in the last bit between the
vectorized part of a tensor and the remainder, so that a time embedding in float32 would depend on the sample's place in the batch."""


class PromoteDtypes(TorchFunctionMode):
    """Context manager in which torch's functions accept floating-point tensors of different dtypes."""

    def __torch_function__(self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu"):
            raise ExportError(
                f"the network uses torch.autocast on the CPU, which would fix the dtype of this part in every graph, at {running_line()}\n"
                "Leave it out: the exporter chooses the dtype of each graph (--dtype), by autocast's rules."
            )
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
