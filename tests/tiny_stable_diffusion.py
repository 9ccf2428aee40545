"""Small random models of Stable Diffusion's classes: diffusers folders, single files in the original layout, and diffusers' pipelines as references."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from scm_export import ops
from text_encoders import save_clip

LATENTS = (8, 12)  # height and width
TEXT, POOLED, SIZE_FEATURES = 24, 20, 256
LAYERS = 1
TRAILING = {"timestep_spacing": "trailing"}
SD_NOISE = {"steps_offset": 1, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# U-Nets of two levels whose first one has attention. As in the published models, SD has 8 heads and SDXL heads of 64 channels, and norms have 32 groups.
_SD = {"block_out_channels": (32, 64), "attention_head_dim": 8}
_SDXL = {
    "block_out_channels": (64, 128),
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZE_FEATURES,
    "projection_class_embeddings_input_dim": POOLED + 6 * SIZE_FEATURES,
}


def make_networks(*, xl: bool = False, middle: bool = True, **config: Any) -> tuple[Any, Any]:
    """A U-Net and an autoencoder, whose weights float16 holds exactly; with ``middle``, the U-Net has a block and the autoencoder attention in the middle."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=LATENTS,
            layers_per_block=LAYERS,
            cross_attention_dim=TEXT,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            mid_block_type="UNetMidBlock2DCrossAttn" if middle else None,
            **{**(_SDXL if xl else _SD), **config},
        )
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 64),
            mid_block_add_attention=middle,
            scaling_factor=0.13025 if xl else 0.18215,
        )
    for network in (unet, vae):
        network.half().float().eval()
    return unet, vae


def save_folder(folder: Path, scheduler: Any, *, xl: bool = False, middle: bool = True, **config: Any) -> Path:
    """Write the folder of a pipeline without text encoders; without ``middle`` its networks have less to trace."""
    unet, vae = make_networks(xl=xl, middle=middle, **config)
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    scheduler.save_pretrained(folder / "scheduler")
    settings = folder / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps({"set_alpha_to_one": False, "clip_sample": False, **json.loads(settings.read_text())}))  # as published folders have
    index = {
        "_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def add_text(folder: Path, into: Path, *, xl: bool) -> Path:
    """Write a folder with the components of another, and text encoders."""
    into.mkdir()
    for component in ("unet", "vae", "scheduler"):
        (into / component).symlink_to(folder / component)
    first = TEXT - 16 if xl else TEXT
    save_clip(into, hidden=first)
    classes = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
    if xl:
        save_clip(into, "_2", hidden=TEXT - first, projection=POOLED, pad_token="!", seed=1)
        classes |= {"text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"}
    index = json.loads((folder / "model_index.json").read_text())
    (into / "model_index.json").write_text(json.dumps({**index, **{name: ["transformers", cls] for name, cls in classes.items()}}))
    return into


def make_pipeline(folder: Path, scheduler: Any) -> Any:
    """diffusers' pipeline of a folder, with another scheduler."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False)
    if unet.config.addition_embed_type is not None:
        text = _text_components(folder, "CLIPTextModel", "CLIPTextModelWithProjection")
        pipeline = diffusers.StableDiffusionXLPipeline(vae=vae, unet=unet, scheduler=scheduler, **text, add_watermarker=False)
    else:
        others = {**_text_components(folder, "CLIPTextModel"), "safety_checker": None, "feature_extractor": None}
        pipeline = diffusers.StableDiffusionPipeline(vae=vae, unet=unet, scheduler=scheduler, **others, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _text_components(folder: Path, *classes: str) -> dict[str, Any]:
    """Text encoders and tokenizers of a folder; None if it has none."""
    found: dict[str, Any] = {}
    for cls, suffix in zip(classes, ("", "_2"), strict=False):
        encoder, tokenizer = folder / f"text_encoder{suffix}", folder / f"tokenizer{suffix}"
        found[encoder.name] = getattr(transformers, cls).from_pretrained(encoder) if encoder.exists() else None
        found[tokenizer.name] = transformers.CLIPTokenizer.from_pretrained(tokenizer) if tokenizer.exists() else None
    return found


def run_pipeline(pipeline: Any, seeds: Sequence[int], steps: int, output_type: str, **arguments: Any) -> Any:
    """Images or latents of a pipeline that gets this project's noise."""
    first, *draws = noises(seeds, steps)
    height, width = (side * pipeline.vae_scale_factor for side in LATENTS)
    module = sys.modules[type(pipeline.scheduler).__module__]
    with mock.patch.object(module, "randn_tensor", side_effect=draws, create=True):
        return pipeline(latents=first, num_inference_steps=steps, height=height, width=width, output_type=output_type, **arguments).images


def noises(seeds: Sequence[int], steps: int) -> list[Tensor]:
    return [ops.philox_normal(torch.tensor(seeds), draw, (4, *LATENTS)) for draw in range(steps + 1)]


def embeddings(n: int, *, xl: bool, guidance: bool, tokens: int = 77) -> dict[str, Tensor]:
    """Random embeddings, by the names of conditioning inputs, which are also diffusers' names."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = {"prompt_embeds": (n, tokens, TEXT), **({"pooled_prompt_embeds": (n, POOLED)} if xl else {})}
    return {prefix + name: torch.randn(shape, generator=generator) for prefix in ("", *(["negative_"] if guidance else [])) for name, shape in shapes.items()}


# ----------------------------------------------------------------------------
# The original layout, in which level i has the blocks 1 + i (layers + 1) and following.


def save_single_file(path: Path, unet: Any, vae: Any, more: dict[str, Tensor]) -> Path:
    """Write a file in the original layout of Stable Diffusion, with ``more`` tensors."""
    tensors = {f"model.diffusion_model.{_unet_name(name)}": tensor for name, tensor in unet.state_dict().items()}
    levels = len(vae.config.block_out_channels)
    for name, tensor in vae.state_dict().items():
        original = _vae_name(name, levels)
        convolution = ".mid.attn_1." in original and original.endswith("weight") and ".norm." not in original
        tensors[f"first_stage_model.{original}"] = tensor[:, :, None, None].contiguous() if convolution else tensor
    save_file({**tensors, **more}, path)
    return path


_TIME = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
_SIZES = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_ENDS = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", **_TIME, **_SIZES}
_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}


def _unet_name(name: str) -> str:
    parts = name.split(".")
    kind = parts[-1]
    for old, new in _ENDS.items():
        if name.startswith(f"{old}."):
            return f"{new}.{kind}"
    if parts[0] == "mid_block":
        place = f"middle_block.{2 * int(parts[2]) + (parts[1] == 'attentions')}"
        rest = parts[3:]
    else:
        level, what, layer, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
        if parts[0] == "down_blocks":
            block = 1 + level * (LAYERS + 1) + (LAYERS if what == "downsamplers" else layer)
            place = f"input_blocks.{block}.{int(what == 'attentions')}"
            if what == "downsamplers":
                return f"{place}.op.{kind}"
        else:
            block = level * (LAYERS + 1) + (LAYERS if what == "upsamplers" else layer)
            place = f"output_blocks.{block}.{int(what != 'resnets')}"  # upsamplers come after the attention, which the last level has not
        if what == "attentions":
            return ".".join([place, *rest])
    return ".".join([place, {**_RESNET, "conv_shortcut": "skip_connection"}.get(rest[0], rest[0]), *rest[1:]])


_VAE = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
    "resnets": "block",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "down_blocks": "down",
}


def _vae_name(name: str, levels: int) -> str:
    for level in range(levels):
        name = name.replace(f"up_blocks.{level}.", f"up.{levels - 1 - level}.")
    for old, new in _VAE.items():
        name = name.replace(old, new)
    return name
