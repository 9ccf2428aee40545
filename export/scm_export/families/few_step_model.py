"""Builds the Model of a Stable Diffusion U-Net with a scheduler for few steps: what the families of such models share."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from scm_export.checkpoints import DiffusersFolder
from scm_export.choices import SchedulerName
from scm_export.errors import CheckpointError
from scm_export.families.autoencoders import downsampling, image_networks
from scm_export.families.diffusers_networks import (
    check_size,
    keep_time_features_fp32,
    make_batch_dynamic,
    make_network,
    read_weights,
    sample_size,
    share_weights,
    unet_keeps_fp32,
)
from scm_export.families.family import BuildOptions
from scm_export.families.few_step_schedulers import CLASSES, STEPS, TRANSITIONS, FewStepSampler, check_scheduler, initial_scale, scheduler_times
from scm_export.families.scheduler_reference import scheduler_reference
from scm_export.families.text import clip_pair_text, clip_text
from scm_export.families.text_encoder import read_text_encoder
from scm_export.families.text_unets import TIME_IDS, ClassifierFreeGuidance, TextUNet, check_unet, pooled_size, text_conditioning
from scm_export.families.weights import load_weights
from scm_export.lora import merge_loras
from scm_export.model import Model, TextEncoder
from scm_export.precision import Precision
from scm_runtime.bundle.manifest import Conditioning

DOWNSAMPLING = 8  #  pixels per latent of Stable Diffusion's autoencoders
SIGMA_DATA = 1.0  #  diffusers scales latents to unit variance


def few_step_model(
    family: str,
    folder: DiffusersFolder,
    component: str,
    scheduler: tuple[SchedulerName, Any],
    options: BuildOptions,
    *,
    added: tuple[str | None, ...] = (None,),
    steps: Collection[int] = STEPS,
) -> Model:
    """Build the Model of a U-Net and a scheduler.

    Args:
        family: its name.
        folder: of the U-Net and, unless the options have another, the autoencoder.
        component: the U-Net in the folder.
        scheduler: its name, and an instance of diffusers' class.
        options: the user's.
        added: allowed values of the U-Net's addition_embed_type.
        steps: numbers of steps.

    Raises:
        CheckpointError: the U-Net or the scheduler has settings that are not supported, there is no autoencoder, or the weights do not fit.
        InvalidArgumentError: the U-Net cannot generate images of the requested size.
    """
    name, original_scheduler = scheduler
    check_scheduler(name, original_scheduler.config, folder.describe())
    transition, times = TRANSITIONS[name](original_scheduler), scheduler_times(name, original_scheduler, steps)
    if not times:
        raise CheckpointError(f"the {CLASSES[name]} of {folder.describe()} has no timesteps above 0. Check its num_train_timesteps.")
    unet, original = make_network(folder, component), make_network(folder, component)
    config: Any = unet.config
    check_unet(config, folder, added=added)
    conditioning = text_conditioning(config, guidance=options.guidance)
    unit = downsampling(options, folder, DOWNSAMPLING)
    height, width = sample_size(config, options.size, unit)
    sample_shape, size = (config.in_channels, height, width), (height * unit, width * unit)
    make_batch_dynamic(unet)
    check_size(unet, sample_shape, encoder_hidden_states=torch.empty(1, 1, config.cross_attention_dim, device="meta"), added_cond_kwargs=_added(config))
    keep_time_features_fp32(unet)
    images = image_networks(options, sample_shape, SIGMA_DATA, folder=folder)  # before the weights are read: the autoencoder may be missing
    load_weights(unet, read_weights(folder, component))
    merge_loras(options.loras, unet)
    share_weights(original, unet)
    text, notes = read_text_encoder(options, lambda: _text_encoder(folder, config, conditioning, options))
    network: nn.Module = Precision(TextUNet(unet, size), unet_keeps_fp32)
    return Model(
        family=family,
        step=FewStepSampler(ClassifierFreeGuidance(network) if options.guidance else network, transition),
        sample_shape=sample_shape,
        sigma_data=SIGMA_DATA,
        initial_scale=initial_scale(name, original_scheduler),
        times=times,
        time_unit="timestep",
        conditioning=(*conditioning, *transition.conditioning),
        decoder=images.decoder,
        encoder=images.encoder,
        preview=images.preview,
        text=text,
        licence=folder.licence,
        notes=notes,
        reference=scheduler_reference(original, original_scheduler, size),
    )


def _text_encoder(folder: DiffusersFolder, config: Any, conditioning: tuple[Conditioning, ...], options: BuildOptions) -> TextEncoder | None:
    """Read CLIP's encoder, or both of SDXL, with the LoRA files' layers for them."""
    negative = tuple(item.name for item in conditioning if item.name.startswith("negative_"))
    if config.addition_embed_type is None:
        return clip_text(folder, config.cross_attention_dim, negative, options.loras)
    return clip_pair_text(folder, config.cross_attention_dim, pooled_size(config), negative, options.loras)


def _added(config: Any) -> dict[str, Any] | None:
    """SDXL's additional inputs, on the meta device."""
    if config.addition_embed_type is None:
        return None
    return {"text_embeds": torch.empty(1, pooled_size(config), device="meta"), "time_ids": torch.empty(1, TIME_IDS, device="meta")}
