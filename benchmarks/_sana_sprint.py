"""Write a diffusers folder with SANA-Sprint's transformer in full size, 1.6 billion parameters, with random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# Configuration of Sana_Sprint_1.6B_1024px: latents of 32 x 32 x 32, text embeddings of Gemma 2 (2B).
TRANSFORMER: dict[str, Any] = {
    "_class_name": "SanaTransformer2DModel",
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "attention_bias": False,
    "sample_size": 32,
    "patch_size": 1,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "guidance_embeds": True,
    "guidance_embeds_scale": 0.1,
    "qk_norm": "rms_norm_across_heads",
    "timestep_scale": 1.0,
}
SCHEDULER = {"_class_name": "SCMScheduler", "num_train_timesteps": 1000, "prediction_type": "trigflow", "sigma_data": 0.5}


def network() -> Any:
    """Return the transformer on the meta device, without memory for its weights."""
    from diffusers import SanaTransformer2DModel

    with torch.device("meta"):
        return SanaTransformer2DModel.from_config(TRANSFORMER)


def full_size_folder(path: Path, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write a pipeline folder with transformer and scheduler, and return the number of parameters.

    The weights, in ``dtype``, are written in shards of about 1 GB, one of which is in memory at a time. They are scaled so that the magnitude of the signals
    is preserved through the network.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tuple(parameter.shape) for name, parameter in network().named_parameters()}
    shards: list[list[str]] = [[]]
    room = 10**9
    for name, shape in shapes.items():
        if room < 0:
            shards.append([])
            room = 10**9
        shards[-1].append(name)
        room -= math.prod(shape) * dtype.itemsize
    folder = path / "transformer"
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{index:05}-of-{len(shards):05}.safetensors"
        save_file({name: _random(name, shapes[name], generator).to(dtype) for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    parameters = sum(map(math.prod, shapes.values()))
    index_file = {"metadata": {"total_size": parameters * dtype.itemsize}, "weight_map": weight_map}
    _write(folder / "diffusion_pytorch_model.safetensors.index.json", index_file)
    _write(folder / "config.json", TRANSFORMER)
    (path / "scheduler").mkdir()
    _write(path / "scheduler" / "scheduler_config.json", SCHEDULER)
    parts = {"scheduler": ["diffusers", "SCMScheduler"], "transformer": ["diffusers", "SanaTransformer2DModel"]}
    _write(path / "model_index.json", {"_class_name": "SanaSprintPipeline", **parts})
    return parameters


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith("scale_shift_table"):
        return values / math.sqrt(shape[-1])  # as diffusers initializes it
    if len(shape) == 1:
        return values * 0.02 + (1.0 if name.endswith("weight") else 0.0)  # weight of a norm, or a bias
    return values / math.sqrt(math.prod(shape[1:]))


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
