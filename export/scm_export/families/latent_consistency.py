"""The family ``latent-consistency``: latent consistency models (arXiv 2310.04378) from a folder of diffusers' LatentConsistencyModelPipeline.

The state is Stable Diffusion's, ``sqrt(alpha_t) latents + sqrt(1 - alpha_t) noise``. Times are training timesteps, which are integers; 0 is the end,
without noise. The text encoder is not part of a bundle: its embeddings are an input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scm_export.checkpoints import DiffusersFolder, Loaded
from scm_export.errors import CheckpointError
from scm_export.families.autoencoders import downsampling, image_networks
from scm_export.families.diffusers_networks import (
    check_size,
    find_component,
    injected_noise,
    keep_time_features_fp32,
    make_batch_dynamic,
    make_network,
    make_scheduler,
    read_weights,
    sample_size,
    share_weights,
    unet_keeps_fp32,
)
from scm_export.families.family import BuildOptions, Family
from scm_export.families.weights import load_weights
from scm_export.lora import merge_loras
from scm_export.model import Model, Reference
from scm_export.precision import Precision
from scm_runtime.bundle.manifest import Conditioning
from scm_runtime.common.message_text import printable

PIPELINES = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
UNET, SCHEDULER = "UNet2DConditionModel", "LCMScheduler"
STEPS = (1, 2, 4, 8)
GUIDANCE_SCALE = 8.5  # the pipeline's default
DOWNSAMPLING = 8  #     pixels per latent of Stable Diffusion's autoencoder
SIGMA_DATA = 1.0  #     diffusers scales latents to unit variance


class GuidedUNet(nn.Module):
    """diffusers' U-Net with this project's input names: ``(x, timestep, prompt_embeds, guidance_scale)`` to its prediction, ``[N, C, H, W]``."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        config: Any = unet.config
        half = config.time_cond_proj_dim // 2
        # Not a buffer, whose dtype would follow the network's: the angles are in the thousands and need float32. Computed here and not in the graph, because
        # the last bit of an exponential differs between libraries.
        self.frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
        self.padding = config.time_cond_proj_dim % 2

    def forward(self, x: Tensor, timestep: Tensor, prompt_embeds: Tensor, guidance_scale: Tensor) -> Tensor:
        angles = ((guidance_scale - 1) * 1000)[:, None] * self.frequencies
        w = nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, self.padding))
        y: Tensor = self.unet(x, timestep, encoder_hidden_states=prompt_embeds, timestep_cond=w, return_dict=False)[0]
        return y


class LatentConsistencyStep(nn.Module):
    """One step from timestep t to t_next, integers in float32: Algorithm 3 of arXiv 2310.04378, as LCMScheduler implements it."""

    coefficients: Tensor
    renoising: Tensor

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        """Create the step from a U-Net and its scheduler, whose table of alphas becomes part of the step."""
        super().__init__()
        self.network = Precision(GuidedUNet(unet), unet_keeps_fp32)
        config = scheduler.config
        self.prediction, self.clip = config.prediction_type, float(config.clip_sample_range) if config.clip_sample else None
        alphas = scheduler.alphas_cumprod
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(torch.arange(len(alphas)))
        coefficients = torch.stack([c_skip, c_out, alphas.sqrt(), (1 - alphas).sqrt()], dim=1)
        if not torch.isfinite(coefficients).all() or (self.clip is not None and not 0 < self.clip < math.inf):
            raise CheckpointError(f"the {SCHEDULER} must have finite betas and timestep_scaling, and a positive clip_sample_range. Check its configuration.")
        self.register_buffer("coefficients", coefficients)  # [T, 4], indexed by t
        after = torch.cat([torch.ones(1), alphas[1:]])
        self.register_buffer("renoising", torch.stack([after.sqrt(), (1 - after).sqrt()], dim=1))  # [T, 2], indexed by t_next

    def forward(self, x: Tensor, t: Tensor, t_next: Tensor, noise: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        t, t_next = t.round(), t_next.round()
        c_skip, c_out, signal, spread = _rows(self.coefficients, t)
        y: Tensor = self.network(x, t, **conditioning)
        match self.prediction:
            case "epsilon":
                x0 = (x - spread * y) / signal
            case "v_prediction":
                x0 = signal * x - spread * y
            case _:
                x0 = y
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        denoised = c_out * x0 + c_skip * x
        signal, spread = _rows(self.renoising, t_next)
        return signal * denoised + spread * noise


def recognizes_latent_consistency(loaded: Loaded) -> bool:
    if not isinstance(loaded, DiffusersFolder):
        return False
    return loaded.pipeline in PIPELINES or (loaded.find(SCHEDULER) is not None and loaded.find(UNET) is not None)


def build_latent_consistency(loaded: Loaded, options: BuildOptions) -> Model:
    """Build the Model of a folder of LatentConsistencyModelPipeline.

    Raises:
        CheckpointError: the folder holds another model, lacks a component, or its weights do not fit its configuration.
        InvalidArgumentError: the network cannot generate images of the requested size.
    """
    folder, component = find_component(loaded, "latent-consistency", UNET)
    scheduler = make_scheduler(folder, SCHEDULER)
    unet, original = make_network(folder, component), make_network(folder, component)
    config: Any = unet.config
    _check(config, scheduler.config, folder)
    sample_shape = (config.in_channels, *sample_size(config, options.size, downsampling(options, folder, DOWNSAMPLING)))
    make_batch_dynamic(unet)
    check_size(unet, sample_shape, encoder_hidden_states=torch.empty(1, 1, config.cross_attention_dim, device="meta"))
    keep_time_features_fp32(unet)
    images = image_networks(options, sample_shape, SIGMA_DATA, folder=folder)  # before the weights are read: the autoencoder may be missing
    load_weights(unet, read_weights(folder, component))
    merge_loras(options.loras, unet)
    share_weights(original, unet)
    return Model(
        family="latent-consistency",
        step=LatentConsistencyStep(unet, scheduler),
        sample_shape=sample_shape,
        sigma_data=SIGMA_DATA,
        initial_scale=float(scheduler.init_noise_sigma),
        times={count: _times(scheduler, count) for count in STEPS if count <= scheduler.config.original_inference_steps},
        time_unit="timestep",
        conditioning=(
            Conditioning(name="prompt_embeds", kind="embedding", dtype="float32", shape=("tokens", config.cross_attention_dim)),
            Conditioning(name="guidance_scale", kind="scalar", dtype="float32", default=GUIDANCE_SCALE),
        ),
        decoder=images.decoder,
        encoder=images.encoder,
        preview=images.preview,
        reference=lcm_scheduler(original, scheduler),
    )


def _check(unet: Any, scheduler: Any, folder: DiffusersFolder) -> None:
    """Check for configurations that LatentConsistencyModelPipeline does not support. Raises CheckpointError."""
    if unet.time_cond_proj_dim is None:
        raise CheckpointError(
            f"the {UNET} of {folder.describe()} must have time_cond_proj_dim, the embedding of the guidance scale, as distilled U-Nets have; "
            "this one has none. With LCM-LoRA it would need classifier-free guidance: that is not supported."
        )
    unused = dict.fromkeys(("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type"))
    for name, value in {**unused, "out_channels": unet.in_channels}.items():
        if unet[name] != value:
            raise CheckpointError(
                f"{name} of the {UNET} in {folder.describe()} must be {value!r}, got {unet[name]!r}: models with more inputs are not supported"
            )
    if not isinstance(unet.cross_attention_dim, int):
        raise CheckpointError(f"cross_attention_dim of the {UNET} in {folder.describe()} must be an integer, got {unet.cross_attention_dim!r}")
    if not (isinstance(scheduler.original_inference_steps, int) and scheduler.original_inference_steps >= 1):
        steps = printable(scheduler.original_inference_steps)
        raise CheckpointError(f"original_inference_steps of the {SCHEDULER} in {folder.describe()} must be an integer of at least 1, got {steps}")
    if scheduler.thresholding:
        raise CheckpointError(f"the {SCHEDULER} of {folder.describe()} must have thresholding = false: dynamic thresholding is not for latents")
    predictions = ("epsilon", "sample", "v_prediction")
    if scheduler.prediction_type not in predictions:
        raise CheckpointError(f"prediction_type of the {SCHEDULER} must be one of {', '.join(predictions)}, got '{printable(scheduler.prediction_type)}'")


def _times(scheduler: Any, count: int) -> tuple[float, ...]:
    scheduler.set_timesteps(count)
    return (*map(float, scheduler.timesteps.tolist()), 0.0)


def lcm_scheduler(unet: nn.Module, scheduler: Any) -> Reference:
    """Reference sampler: diffusers' scheduler and U-Net, in the loop of LatentConsistencyModelPipeline."""
    import diffusers
    from diffusers.models.embeddings import get_timestep_embedding
    from diffusers.schedulers import scheduling_lcm

    @torch.no_grad()
    def sample(noises: Sequence[Tensor], times: tuple[float, ...], conditioning: dict[str, Tensor]) -> Tensor:
        scheduler.set_timesteps(len(times) - 1)
        scheduler.timesteps = torch.tensor(times[:-1]).long()  # the scheduler's timesteps, or others that the caller chose
        config: Any = unet.config
        w = get_timestep_embedding((conditioning["guidance_scale"] - 1) * 1000, config.time_cond_proj_dim)
        x: Tensor = noises[0] * scheduler.init_noise_sigma
        with injected_noise(scheduling_lcm, noises[1:]):
            for t in scheduler.timesteps:
                y = unet(x, t, encoder_hidden_states=conditioning["prompt_embeds"], timestep_cond=w, return_dict=False)[0]
                x, _ = scheduler.step(y, t, x, return_dict=False)
        return x

    return Reference(f"{SCHEDULER} of diffusers {diffusers.__version__}", sample)


def _rows(table: Tensor, t: Tensor) -> list[Tensor]:
    """Look up the rows of a table ``[T, K]`` for timesteps ``[N]``: K tensors ``[N, 1, 1, 1]``, which broadcast to the state."""
    rows = table[t.long().clamp(0, len(table) - 1)]
    return [column.reshape(-1, 1, 1, 1) for column in rows.unbind(1)]


FAMILY = Family(
    looks_for=f"a diffusers folder of {PIPELINES[0]}: a {UNET} with a {SCHEDULER}",
    recognizes=recognizes_latent_consistency,
    build=build_latent_consistency,
    takes_lora=True,
    dtype="fp16",
)
