"""Reference samplers: diffusers' scheduler classes and U-Net in the loop of its pipelines, with this project's noise."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scm_export.families.diffusers_networks import injected_noise
from scm_export.families.text_unets import double_conditioning, time_ids
from scm_export.model import Reference

Predict = Callable[[Tensor, Tensor], Tensor]
"""(state as the U-Net reads it, timestep) to the prediction, both ``[N, C, H, W]``."""


def scheduler_reference(unet: nn.Module, scheduler: Any, size: tuple[int, int]) -> Reference:
    """Return the reference of a U-Net and a scheduler, instances of diffusers' classes, for images of a height and width in pixels."""
    import diffusers

    @torch.no_grad()
    def sample(noises: Sequence[Tensor], times: tuple[float, ...], conditioning: dict[str, Tensor]) -> Tensor:
        scheduler.set_timesteps(len(times) - 1)
        etas = conditioning.get("eta")
        predict = _predictor(unet, {name: value for name, value in conditioning.items() if name != "eta"}, size)
        return _loop(scheduler, noises, predict, None if etas is None else [float(eta) for eta in etas])

    return Reference(f"{type(scheduler).__name__} of diffusers {diffusers.__version__}", sample)


def _loop(scheduler: Any, noises: Sequence[Tensor], predict: Predict, etas: list[float] | None) -> Tensor:
    """The loop of diffusers' pipelines. With etas, one per sample, each sample has a copy of the scheduler, whose eta is one number for a batch."""
    module = sys.modules[type(scheduler).__module__]
    x: Tensor = noises[0] * scheduler.init_noise_sigma
    if etas is None:
        with injected_noise(module, noises[1:]):
            for t in scheduler.timesteps:
                x = scheduler.step(predict(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
        return x
    copies = [copy.deepcopy(scheduler) for _ in etas]
    for step, t in enumerate(scheduler.timesteps):
        y = predict(x, t)
        x = torch.cat(list(_steps_of_samples(copies, module, noises[step + 1], y, t, x, etas)))
    return x


def _steps_of_samples(schedulers: Sequence[Any], module: Any, noise: Tensor, y: Tensor, t: Tensor, x: Tensor, etas: list[float]) -> Iterator[Tensor]:
    for i, (scheduler, eta) in enumerate(zip(schedulers, etas, strict=True)):
        with injected_noise(module, [noise[i : i + 1]]):
            yield scheduler.step(y[i : i + 1], t, x[i : i + 1], eta=eta, return_dict=False)[0]


def _predictor(unet: nn.Module, conditioning: dict[str, Tensor], size: tuple[int, int]) -> Predict:
    """Return the U-Net with its conditioning as diffusers' pipelines pass it."""
    from diffusers.models.embeddings import get_timestep_embedding

    config: Any = unet.config
    scale = conditioning.get("guidance_scale")
    w = None if config.time_cond_proj_dim is None or scale is None else get_timestep_embedding((scale - 1) * 1000, config.time_cond_proj_dim)
    guided = "negative_prompt_embeds" in conditioning
    inputs = double_conditioning({name: value for name, value in conditioning.items() if name != "guidance_scale"}) if guided else conditioning
    text, pooled = inputs["prompt_embeds"], inputs.get("pooled_prompt_embeds")
    added = None if pooled is None else {"text_embeds": pooled, "time_ids": torch.tensor([time_ids(size)] * len(pooled))}

    def predict(x: Tensor, t: Tensor) -> Tensor:
        doubled = torch.cat([x, x]) if guided else x
        y: Tensor = unet(doubled, t, encoder_hidden_states=text, timestep_cond=w, added_cond_kwargs=added, return_dict=False)[0]
        if not guided:
            return y
        assert scale is not None
        negative, positive = y.chunk(2)
        guidance = scale.reshape(-1, 1, 1, 1)
        return torch.where(guidance > 1, negative + guidance * (positive - negative), positive)

    return predict
