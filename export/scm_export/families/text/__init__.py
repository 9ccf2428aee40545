"""Text encoders of diffusers' folders: transformers' networks and tokenizers as a :class:`~scm_export.model.TextEncoder`.

A family calls the function of its kind of encoder. Each returns None if the folder has no text encoder.
"""

from scm_export.families.text.clip import clip_pair_text, clip_text
from scm_export.families.text.gemma import gemma_text
from scm_export.families.text.t5 import t5_text

__all__ = ["clip_pair_text", "clip_text", "gemma_text", "t5_text"]
