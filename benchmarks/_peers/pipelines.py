"""diffusers' pipelines with the same noise, without text encoder and autoencoder, as for the other peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from _peers.case import Case, Draw

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def open_pipeline(case: Case, n: int, threads: int, device: str, *, channels_last: bool, dtype: str = "fp32") -> Draw:
    """Open a pipeline. ``channels_last`` is the memory format of weights and feature maps."""
    torch.set_num_threads(threads)
    family = case.facts.family
    opened = {"sana-sprint": _sana_sprint, "consistency": _consistency, "latent-consistency": _latent_consistency}[family]
    tensors = {name: torch.from_numpy(value).to(device) for name, value in case.conditioning(n).items()}
    noises = [torch.from_numpy(noise).to(device) for noise in case.noises(n)]
    draws: list[torch.Tensor] = []
    run = opened(case, noises[0], tensors, lambda *_args, **_kwargs: draws.pop(0), device, DTYPES[dtype], channels_last)

    @torch.inference_mode()
    def draw() -> NDArray[np.float32]:
        draws[:] = noises[1:]
        return run().float().cpu().numpy()

    return draw


Run = Callable[[], torch.Tensor]


def _ready(pipeline: Any, network: Any, device: str, *, channels_last: bool) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    if channels_last:
        network.to(memory_format=torch.channels_last)
    return pipeline.to(device)


def _sana_sprint(case: Case, first: torch.Tensor, given: dict[str, torch.Tensor], noise: Any, device: str, dtype: torch.dtype, channels_last: bool) -> Run:
    from diffusers import SanaSprintPipeline
    from diffusers.schedulers import scheduling_scm

    pipeline = SanaSprintPipeline.from_pretrained(case.checkpoint, tokenizer=None, text_encoder=None, vae=None, torch_dtype=dtype)
    _ready(pipeline, pipeline.transformer, device, channels_last=channels_last)
    scheduling_scm.randn_tensor = noise
    steps, (_, _, height, width) = len(case.facts.times) - 1, first.shape

    def run() -> torch.Tensor:
        latents: torch.Tensor = pipeline(
            prompt_embeds=given["prompt_embeds"],
            prompt_attention_mask=given["prompt_attention_mask"],
            guidance_scale=float(given["guidance_scale"][0]),
            num_inference_steps=steps,
            intermediate_timesteps=case.facts.times[1] if steps == 2 else None,
            max_timesteps=case.facts.times[0],
            latents=first,
            height=height * pipeline.vae_scale_factor,
            width=width * pipeline.vae_scale_factor,
            use_resolution_binning=False,
            output_type="latent",
        ).images
        return latents * case.facts.sigma_data

    return run


def _consistency(case: Case, first: torch.Tensor, given: dict[str, torch.Tensor], noise: Any, device: str, dtype: torch.dtype, channels_last: bool) -> Run:
    from diffusers import ConsistencyModelPipeline
    from diffusers.schedulers import scheduling_consistency_models

    pipeline = ConsistencyModelPipeline.from_pretrained(case.checkpoint, torch_dtype=dtype)
    _ready(pipeline, pipeline.unet, device, channels_last=channels_last)
    scheduling_consistency_models.randn_tensor = noise
    levels = _levels(pipeline.scheduler, case.facts.times)

    def run() -> torch.Tensor:
        images: torch.Tensor = pipeline(
            len(first), class_labels=given.get("class_labels"), num_inference_steps=None, timesteps=levels, latents=first, output_type="pt"
        ).images
        return images * 2 - 1

    return run


def _levels(scheduler: Any, times: list[float]) -> list[int]:
    """Return the indices of the noise levels that equal the times, in the order that the pipeline expects."""
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    sigmas = np.asarray(scheduler.sigmas)
    return sorted((int(np.abs(sigmas - t).argmin()) for t in times[:-1]), reverse=True)


def _latent_consistency(
    case: Case, first: torch.Tensor, given: dict[str, torch.Tensor], noise: Any, device: str, dtype: torch.dtype, channels_last: bool
) -> Run:
    from diffusers import LatentConsistencyModelPipeline
    from diffusers.schedulers import scheduling_lcm

    nothing: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = LatentConsistencyModelPipeline.from_pretrained(case.checkpoint, **nothing, requires_safety_checker=False, torch_dtype=dtype)
    _ready(pipeline, pipeline.unet, device, channels_last=channels_last)
    scheduling_lcm.randn_tensor = noise
    steps = len(case.facts.times) - 1

    def run() -> torch.Tensor:
        latents: torch.Tensor = pipeline(
            prompt_embeds=given["prompt_embeds"],
            guidance_scale=float(given["guidance_scale"][0]),
            num_inference_steps=steps,
            latents=first,
            output_type="latent",
        ).images
        return latents

    return run
