"""``GroupNorm`` (Wu and He, arXiv 1803.08494) of channels-first feature maps, alone or with the modulation and the SiLU that follow it in U-Nets.

No network calls these functions: :mod:`scm_export.graphs.norms` replaces the normalizations of traced networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from scm_export.ops.operator import Operator


def group_norm(x: Tensor, scale: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Normalize each group of channels, with all its pixels, to mean 0 and variance 1; then ``y * scale + bias``.

    Args:
        x: ``[N, C, ...]``, any floating dtype.
        scale: ``[C]``, float32.
        bias: ``[C]``, float32.
        groups: number of groups; divides C.
        eps: added to the variance.

    Returns:
        A tensor like ``x``. It is computed in float32 and rounded once.
    """
    return functional.group_norm(x.float(), groups, scale, bias, eps).to(x.dtype)


def group_norm_silu(x: Tensor, scale: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """``silu(group_norm(x))``. The arguments are those of :func:`group_norm`."""
    return functional.silu(group_norm(x, scale, bias, groups, eps))


def group_norm_modulate_silu(x: Tensor, scale: Tensor, bias: Tensor, modulation: Tensor, groups: int, eps: float) -> Tensor:
    """``silu(group_norm(x) * (1 + s) + b)`` with ``[s, b] = modulation``, as in ADM (arXiv 2105.05233, section 4.2, AdaGN).

    Args:
        x: ``[N, C, ...]``, any floating dtype.
        scale: ``[C]``, float32.
        bias: ``[C]``, float32.
        modulation: ``[N, 2 C]``, with the dtype of ``x``.
        groups: number of groups; divides C.
        eps: added to the variance.
    """
    factor, shift = (half.reshape(*half.shape, *[1] * (x.ndim - 2)) for half in modulation.chunk(2, dim=1))
    return functional.silu(group_norm(x, scale, bias, groups, eps) * (1 + factor) + shift)


# The maps are [N, C, pixels] within a body, so that one body serves any rank. ONNX Runtime folds what is computed from attributes.
_NORMALIZED = """
    minus_one = Constant <value_ints = [-1]> ()
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_float = 1.0> ()
    no = Constant <value_float = 0.0> ()
    groups_scalar = Constant <value_int: int = @groups> ()
    channels_scalar = Constant <value_int: int = @channels> ()
    groups_ = Reshape (groups_scalar, minus_one)
    channels_ = Reshape (channels_scalar, minus_one)
    grouped_shape = Concat <axis = 0> (zero, groups_, minus_one)
    flat_shape = Concat <axis = 0> (zero, channels_, minus_one)
    ones = Expand (one, groups_)
    zeros = Expand (no, groups_)
    wide = Cast <to = 1> (x)
    grouped = Reshape (wide, grouped_shape)
    standard = InstanceNormalization <epsilon: float = @eps> (grouped, ones, zeros)
    flat = Reshape (standard, flat_shape)
    scale_column = Unsqueeze (scale, minus_one)
    bias_column = Unsqueeze (bias, minus_one)
    scaled = Mul (flat, scale_column)
    shifted = Add (scaled, bias_column)
    normalized = CastLike (shifted, x)
    shape = Shape (x)
"""

_MODULATED = """
    factors, shifts = Split <axis = 1, num_outputs = 2> (modulation)
    factor = Unsqueeze (factors, minus_one)
    shift = Unsqueeze (shifts, minus_one)
    one_T = CastLike (one, x)
    gain = Add (factor, one_T)
    amplified = Mul (normalized, gain)
    modulated = Add (amplified, shift)
"""


def _silu(x: str) -> str:
    return f"""
        sigmoid = Sigmoid ({x})
        activated = Mul ({x}, sigmoid)
        y = Reshape (activated, shape)
    """


def _channels(x: tuple[int, ...], *_: Any) -> int:
    return x[1]


_COMMON: dict[str, Any] = {"output": "y", "output_type": "T", "attributes": ("groups", "eps")}
_SIZES: dict[str, Callable[..., int]] = {"channels": _channels}
_INPUTS = {"x": "T", "scale": "float", "bias": "float"}

GROUP_NORM = Operator(name="GroupNorm", inputs=_INPUTS, sizes=_SIZES, body=f"{_NORMALIZED} y = Reshape (normalized, shape)", **_COMMON)

GROUP_NORM_SILU = Operator(name="GroupNormSiLU", inputs=_INPUTS, sizes=_SIZES, body=_NORMALIZED + _silu("normalized"), **_COMMON)

GROUP_NORM_MODULATE_SILU = Operator(
    name="GroupNormModulateSiLU", inputs={**_INPUTS, "modulation": "T"}, sizes=_SIZES, body=_NORMALIZED + _MODULATED + _silu("modulated"), **_COMMON
)
