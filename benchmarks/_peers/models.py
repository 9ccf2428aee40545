"""Checkpoints of all sizes. The weights are random, because neither time nor memory depends on their values."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from scm_export.checkpoints import Checkpoint, SamplerSpec, save_checkpoint
from scm_export.networks.edm2 import PRESETS, UNet, UNetConfig

DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "digits.pt"
SCM: dict[str, Any] = {"time_embedding": "positional", "modulation": "scale-shift"}  # sCM's changes to EDM2's networks

SANA = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 16,
    "attention_head_dim": 32,
    "num_layers": 6,
    "num_cross_attention_heads": 8,
    "cross_attention_head_dim": 64,
    "cross_attention_dim": 512,
    "caption_channels": 256,
    "mlp_ratio": 2.5,
    "sample_size": 32,
    "patch_size": 1,
    "interpolation_scale": None,
    "guidance_embeds": True,
    "guidance_embeds_scale": 0.1,
    "qk_norm": "rms_norm_across_heads",
    "timestep_scale": 1.0,
}
# OpenAI's blocks, with fewer channels.
CM = {
    "sample_size": 32,
    "block_out_channels": (64, 128, 192),
    "layers_per_block": 2,
    "attention_head_dim": 64,
    "num_class_embeds": 10,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
}
LCM = {
    "sample_size": 32,
    "block_out_channels": (64, 128, 256),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 256,
    "time_cond_proj_dim": 64,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}


def random_checkpoint(config: UNetConfig, path: Path) -> Path:
    """Write an EDM2 network with random weights as a scm-checkpoint, and return its path."""
    torch.manual_seed(0)
    net = UNet(config)
    torch.nn.init.ones_(net.out_gain)
    save_checkpoint(Checkpoint(family="edm2", config=asdict(config), sampler=SamplerSpec(), weights=net.state_dict()), path)
    return path


def edm2_config(size: str) -> UNetConfig:
    """Return the configuration of an EDM2 network with sCM's changes."""
    resolution = 32 if size == "XXS" else 64
    return replace(PRESETS[size], img_resolution=resolution, **SCM)


def write_checkpoint(size: str, folder: Path) -> str:
    """Write the checkpoint of a size, and return its name in the folder."""
    torch.manual_seed(0)
    if size == "digits":
        (folder / DIGITS.name).symlink_to(DIGITS)
        return DIGITS.name
    if size in PRESETS:
        return random_checkpoint(edm2_config(size), folder / f"{size}.pt").name
    {"SANA-Sprint": _sana, "CM": _cm, "LCM": _lcm}[size](folder / "diffusers")
    return "diffusers"


def _sana(folder: Path) -> None:
    from diffusers import SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler

    transformer = _randomized(SanaTransformer2DModel(**SANA))
    SanaSprintPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=SCMScheduler()).save_pretrained(folder)


def _cm(folder: Path) -> None:
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

    ConsistencyModelPipeline(_randomized(UNet2DModel(**CM)), CMStochasticIterativeScheduler(num_train_timesteps=40)).save_pretrained(folder)


def _lcm(folder: Path) -> None:
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel

    parts: dict[str, Any] = {"unet": _randomized(UNet2DConditionModel(**LCM)), "scheduler": LCMScheduler(prediction_type="v_prediction")}
    others: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    LatentConsistencyModelPipeline(**parts, **others, requires_safety_checker=False).save_pretrained(folder)


@torch.no_grad()
def _randomized(network: Any) -> Any:
    """Randomize every weight, scaled so that the magnitude of the signals is preserved."""
    for name, parameter in network.named_parameters():
        values = torch.randn_like(parameter)
        if parameter.ndim > 1:
            parameter.copy_(values / math.sqrt(math.prod(parameter.shape[1:])))
        else:
            parameter.copy_(0.02 * values + (1.0 if name.endswith("weight") else 0.0))
    return network.eval()
