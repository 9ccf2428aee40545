"""Configurations of Stable Diffusion's networks in its original layout, inferred from the names and shapes of their tensors.

The original files have no configuration. Diffusers downloads one for the model type; what it holds follows from the tensors, except for the constants here,
which are the same in all published models of a type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from scm_export.errors import CheckpointError

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
TEXT_PREFIXES = ("cond_stage_model.", "conditioner.embedders.")

HEADS = 8  #          of Stable Diffusion 1, whose projections around attention are convolutions
HEAD_SIZE = 64  #     of Stable Diffusion 2 and XL, whose projections are linear layers
SIZE_EMBEDDING = 256  # features of each of SDXL's sizes
TYPES = {"sd": {"sample_size": 64, "scaling_factor": 0.18215}, "sdxl": {"sample_size": 128, "scaling_factor": 0.13025}}
MAX_BLOCKS = 100  # of a U-Net or an autoencoder; SDXL's U-Net has 9 on each side

_INDEX = re.compile(r"(\d+)\.")


class Layers:
    """The tensors of one network, by their names after a prefix."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, where: str) -> None:
        self.prefix, self.where = prefix, where
        self.tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises CheckpointError if there is none of this name."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.where} must have the tensor {self.prefix}{name}, as Stable Diffusion's original files do. Download the file again.")
        return tuple(self.tensors[name].shape)

    def count(self, prefix: str) -> int:
        """Return one more than the largest number after a prefix, such as ``input_blocks.``; 0 if no tensor has it. Raises CheckpointError above MAX_BLOCKS."""
        found = (_INDEX.match(name, len(prefix)) for name in self.tensors if name.startswith(prefix))
        count = max((int(match[1]) + 1 for match in found if match), default=0)
        if count > MAX_BLOCKS:
            raise CheckpointError(f"{self.where} must have at most {MAX_BLOCKS} layers under {self.prefix}{prefix}, got {count}")
        return count


def unet_config(unet: Layers) -> dict[str, Any]:
    """Return the configuration of diffusers' UNet2DConditionModel. Raises CheckpointError for a network of another structure."""
    levels: list[list[int]] = [[]]  # of each level: the blocks with a residual layer
    for i in range(1, unet.count("input_blocks.")):
        if f"input_blocks.{i}.0.op.weight" in unet.tensors:
            levels.append([])
        else:
            levels[-1].append(i)
    if len({len(level) for level in levels}) > 1 or not levels[0]:
        counts = ", ".join(str(len(level)) for level in levels)
        raise CheckpointError(f"{unet.where} must have the same number of layers on each level of its U-Net, as Stable Diffusion has; got {counts}")
    channels = tuple(unet.shape(f"input_blocks.{level[-1]}.0.out_layers.3.weight")[0] for level in levels)
    depths = tuple(unet.count(f"input_blocks.{level[0]}.1.transformer_blocks.") for level in levels)
    attention = next((level[0] for level, depth in zip(levels, depths, strict=True) if depth), None)
    if attention is None:
        raise CheckpointError(f"{unet.where} must have attention to text in its U-Net, as Stable Diffusion has")
    middle = unet.count("middle_block.1.transformer_blocks.")
    linear = len(unet.shape(f"input_blocks.{attention}.1.proj_in.weight")) == 2
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": TYPES[model_type(unet)]["sample_size"],
        "in_channels": unet.shape("input_blocks.0.0.weight")[1],
        "out_channels": unet.shape("out.2.weight")[0],
        "block_out_channels": channels,
        "layers_per_block": len(levels[0]),
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        # The middle block has the last level's depth, also if that level itself has no attention.
        "transformer_layers_per_block": (*(depth or 1 for depth in depths[:-1]), depths[-1] or middle or 1),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else None,
        "cross_attention_dim": unet.shape(f"input_blocks.{attention}.1.transformer_blocks.0.attn2.to_k.weight")[1],
        "attention_head_dim": tuple(max(count // HEAD_SIZE, 1) for count in channels) if linear else HEADS,  # in diffusers the number of heads
        "use_linear_projection": linear,
    }
    if model_type(unet) == "sdxl":
        sizes = {"addition_time_embed_dim": SIZE_EMBEDDING, "projection_class_embeddings_input_dim": unet.shape("label_emb.0.0.weight")[1]}
        config |= {"addition_embed_type": "text_time", **sizes}
    return config


def vae_config(vae: Layers, kind: str) -> dict[str, Any]:
    """Return the configuration of diffusers' AutoencoderKL. ``kind`` is a key of ``TYPES``. Raises CheckpointError for another structure."""
    levels = vae.count("encoder.down.")
    channels = tuple(vae.shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels))
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": vae.shape("encoder.conv_in.weight")[1],
        "out_channels": vae.shape("decoder.conv_out.weight")[0],
        "block_out_channels": channels,
        "layers_per_block": vae.count("encoder.down.0.block."),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "latent_channels": vae.shape("decoder.conv_in.weight")[1],
        "scaling_factor": TYPES[kind]["scaling_factor"],
    }


def model_type(unet: Layers) -> str:
    """Return "sdxl" for a U-Net that also reads sizes and a pooled embedding, else "sd"."""
    return "sdxl" if "label_emb.0.0.weight" in unet.tensors else "sd"
