"""The elementary functions that networks and samplers are made of: one file an idea, channels last.

Feature maps are ``[N, H, W, C]`` (or ``[N, C]`` for embeddings); the channel axis is always the last one. EDM2 is arXiv 2312.02696,
sCM is arXiv 2410.11081. Norms are taken in float32 whatever the input's dtype; every function returns its input's dtype.
"""

from scm_export.ops.attention import cosine_attention
from scm_export.ops.consistency import consistency_step
from scm_export.ops.image import to_image
from scm_export.ops.magnitude import modulate_silu, mp_cat, mp_silu, mp_sum, norm_modulate_silu, pixel_norm
from scm_export.ops.philox import philox_normal

__all__ = [
    "consistency_step",
    "cosine_attention",
    "modulate_silu",
    "mp_cat",
    "mp_silu",
    "mp_sum",
    "norm_modulate_silu",
    "philox_normal",
    "pixel_norm",
    "to_image",
]
