"""LoRA (arXiv 2106.09685): low-rank changes of a network's weights, read from a file and added to the weights before an export.

:func:`open_lora` reads a file, :func:`merge_loras` adds it to a network. A file may have layers for several components of a pipeline: a family merges
those of the denoising network, and whoever builds a text encoder those of the text encoder.
"""

from scm_export.lora.keys import DENOISER, TEXT_ENCODER, TEXT_ENCODER_2, Component
from scm_export.lora.merging import merge_loras
from scm_export.lora.reading import Lora, LoraFile, open_lora, parse_lora

__all__ = ["DENOISER", "TEXT_ENCODER", "TEXT_ENCODER_2", "Component", "Lora", "LoraFile", "merge_loras", "open_lora", "parse_lora"]
