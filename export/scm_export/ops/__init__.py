"""The operators of docs/custom-ops.md, one per file: PyTorch reference, operator schema and ONNX function body.

EDM2's networks and the samplers call their functions in training and in export. While a step is traced, each call becomes a node of its operator.
Attention, normalizations, GEGLU, DepthwiseGLU and ReLULinearAttention are found in traced networks (:mod:`scm_export.graphs`); their functions are references.
Unless stated otherwise, feature maps are channels last, ``[N, ..., C]``, and a function returns the dtype of its input. Norms are always computed in
float32. EDM2 is arXiv 2312.02696, sCM is arXiv 2410.11081.
"""

from scm_export.ops.attention import ATTENTION, MASKED_ATTENTION, attention
from scm_export.ops.consistency_step import CONSISTENCY_STEP, consistency_step
from scm_export.ops.cosine_attention import COSINE_ATTENTION, cosine_attention
from scm_export.ops.dense import CONV, CONV3X3, MATMUL, conv, conv3x3, matmul
from scm_export.ops.depthwise_glu import DEPTHWISE_GLU, depthwise_glu
from scm_export.ops.fused import (
    CONV3X3_MODULATE_SILU,
    CONV3X3_MP_SUM,
    MATMUL_MP_SUM,
    NORM_MODULATE_SILU_COLUMNS,
    conv3x3_modulate_silu,
    conv3x3_mp_sum,
    matmul_mp_sum,
    norm_modulate_silu_columns,
)
from scm_export.ops.geglu import GEGLU, geglu
from scm_export.ops.group_norm import (
    GROUP_NORM,
    GROUP_NORM_MODULATE_SILU,
    GROUP_NORM_SILU,
    group_norm,
    group_norm_modulate_silu,
    group_norm_silu,
)
from scm_export.ops.layer_norm import LAYER_NORM, LAYER_NORM_MODULATE, RMS_NORM, layer_norm, layer_norm_modulate, rms_norm
from scm_export.ops.modulate_silu import MODULATE_SILU, modulate_silu
from scm_export.ops.mp_cat import MP_CAT, mp_cat, mp_cat_silu
from scm_export.ops.mp_silu import MP_SILU, mp_silu
from scm_export.ops.mp_sum import MP_SUM, mp_sum, mp_sum_silu
from scm_export.ops.norm_modulate_silu import NORM_MODULATE_SILU, norm_modulate_silu
from scm_export.ops.operator import Operator, operators_as_nodes
from scm_export.ops.philox_normal import PHILOX_NORMAL, philox_normal
from scm_export.ops.pixel_norm import PIXEL_NORM, pixel_norm, pixel_norm_silu
from scm_export.ops.relu_linear_attention import RELU_LINEAR_ATTENTION, relu_linear_attention
from scm_export.ops.to_image import TO_IMAGE, to_image

OPERATORS: dict[str, Operator] = {
    operator.identifier: operator
    for operator in (
        PIXEL_NORM,
        MP_SILU,
        MP_SUM,
        MP_CAT,
        MODULATE_SILU,
        NORM_MODULATE_SILU,
        COSINE_ATTENTION,
        RELU_LINEAR_ATTENTION,
        DEPTHWISE_GLU,
        GEGLU,
        ATTENTION,
        MASKED_ATTENTION,
        CONSISTENCY_STEP,
        PHILOX_NORMAL,
        TO_IMAGE,
        CONV3X3,
        MATMUL,
        CONV,
        CONV3X3_MODULATE_SILU,
        CONV3X3_MP_SUM,
        MATMUL_MP_SUM,
        NORM_MODULATE_SILU_COLUMNS,
        GROUP_NORM,
        GROUP_NORM_SILU,
        GROUP_NORM_MODULATE_SILU,
        LAYER_NORM,
        LAYER_NORM_MODULATE,
        RMS_NORM,
    )
}

__all__ = [
    "OPERATORS",
    "Operator",
    "operators_as_nodes",
    "pixel_norm",
    "pixel_norm_silu",
    "mp_silu",
    "mp_sum",
    "mp_sum_silu",
    "mp_cat",
    "mp_cat_silu",
    "modulate_silu",
    "norm_modulate_silu",
    "cosine_attention",
    "relu_linear_attention",
    "depthwise_glu",
    "geglu",
    "attention",
    "consistency_step",
    "philox_normal",
    "to_image",
    "conv",
    "conv3x3",
    "matmul",
    "conv3x3_modulate_silu",
    "conv3x3_mp_sum",
    "matmul_mp_sum",
    "norm_modulate_silu_columns",
    "group_norm",
    "group_norm_silu",
    "group_norm_modulate_silu",
    "layer_norm",
    "layer_norm_modulate",
    "rms_norm",
]
