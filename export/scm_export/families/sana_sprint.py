"""The family ``sana-sprint``: SANA-Sprint (arXiv 2503.09641) as diffusers saves it, text to image in 1 to 4 steps.

The text encoder is Gemma 2. The transformer is diffusers' class, a flow-matching network that is sampled with
the TrigFlow sampler.
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
from scm_export.families.diffusers_networks import find_component, injected_noise, make_network, make_scheduler, read_weights, sample_size, share_weights
from scm_export.families.family import BuildOptions, Family
from scm_export.families.text import gemma_text
from scm_export.families.text_encoder import read_text_encoder
from scm_export.families.weights import load_weights
from scm_export.lora import merge_loras
from scm_export.model import Model, Reference
from scm_export.parametrisation import Step
from scm_export.precision import Precision, is_norm
from scm_runtime.bundle.manifest import Conditioning
from scm_runtime.common.message_text import printable
from scm_runtime.errors import InvalidArgumentError

PIPELINES = ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline")
TRANSFORMER, SCHEDULER = "SanaTransformer2DModel", "SCMScheduler"
DOWNSAMPLING = 32  #  pixels per latent of SANA's autoencoder
T_MAX = 1.5708  #     SANA-Sprint's value, slightly above pi/2: there cos t < 0, and u = sin t / (cos t + sin t) > 1
TIMES = {
    1: (T_MAX, 0.0),
    2: (T_MAX, 1.3, 0.0),
    4: (T_MAX, T_MAX * 3 / 4, T_MAX / 2, T_MAX / 4, 0.0),
}
GUIDANCE_SCALE = 4.5  # SanaSprintPipeline's default


class SanaSprint(nn.Module):
    """diffusers' transformer with this project's input names: ``(x, u, **conditioning)`` to the velocity, float32 ``[N, C, H, W]``."""

    def __init__(self, transformer: nn.Module, guidance_unit: float) -> None:
        """Wrap a transformer. ``guidance_unit`` is the input of its guidance embedding for a guidance scale of 1."""
        super().__init__()
        self.transformer, self.guidance_unit = Precision(transformer, _keeps_fp32), guidance_unit
        own: Any = transformer
        for block in own.transformer_blocks:
            block.attn2.set_processor(_CrossAttention())
        own.time_embed.register_forward_pre_hook(_keep_sinusoids, with_kwargs=True)

    def forward(self, x: Tensor, level: Tensor, prompt_embeds: Tensor, prompt_attention_mask: Tensor, guidance_scale: Tensor) -> Tensor:
        velocity: Tensor = self.transformer(
            x,
            encoder_hidden_states=prompt_embeds,
            encoder_attention_mask=prompt_attention_mask,
            timestep=level,
            guidance=guidance_scale * self.guidance_unit,
            return_dict=False,
        )[0]
        return velocity


class _CrossAttention:
    """Processor for diffusers' ``Attention`` module: attention from pixels to text, with one mask ``[N, 1, tokens]`` for all heads.

    diffusers' processor repeats the mask for each head and views it as ``[batch, heads, -1, tokens]``. For the tracer, the third size is then a quotient of
    two batch sizes, which it cannot prove to be 1.
    """

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        query, key, value = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for projected in (query, key, value))
        found = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask.unsqueeze(1))
        projected: Tensor = attn.to_out[0](found.transpose(1, 2).flatten(2)) / attn.rescale_output_factor
        return projected


def _keep_sinusoids(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Keep the sinusoids of u and guidance in float32. diffusers rounds them to ``hidden_dtype``, the dtype of the feature maps."""
    return args, {**kwargs, "hidden_dtype": torch.float32}


def _keeps_fp32(name: str, module: nn.Module) -> bool:
    """Return True for the time and guidance embedding and for norms. diffusers already computes the sums of linear attention in float32."""
    return name == "time_embed" or is_norm(name, module)


def recognizes_sana_sprint(loaded: Loaded) -> bool:
    if not isinstance(loaded, DiffusersFolder):
        return False
    component = loaded.find(TRANSFORMER)
    return loaded.pipeline in PIPELINES or (component is not None and bool(loaded.config(component).get("guidance_embeds")))


def build_sana_sprint(loaded: Loaded, options: BuildOptions) -> Model:
    """Build the Model of a folder of SanaSprintPipeline, or of its transformer alone.

    Raises:
        CheckpointError: the folder holds another model, lacks a component, or its weights do not fit its configuration.
        InvalidArgumentError: the requested size is not a whole number of latents.
    """
    folder, component = find_component(loaded, "sana-sprint", TRANSFORMER)
    if not folder.config(component).get("guidance_embeds"):
        raise CheckpointError(f"the {TRANSFORMER} of {folder.describe()} must have guidance_embeds, as SANA-Sprint's do: without them it is SANA, for 20 steps")
    scheduler = make_scheduler(folder, SCHEDULER)
    # Two modules that share one set of weights: the second stays unmodified, for the reference sampler.
    transformer, original = make_network(folder, component), make_network(folder, component)
    config: Any = transformer.config
    _check(config, scheduler.config)
    sigma_data = float(scheduler.config.sigma_data)
    height, width = sample_size(config, options.size, downsampling(options, folder, DOWNSAMPLING))
    if height % config.patch_size or width % config.patch_size:
        raise InvalidArgumentError(f"the latents must be whole patches of {config.patch_size}x{config.patch_size}, got {height}x{width}. Try another --size.")
    for network in (transformer, original):
        _set_positional_embedding(network, height, width)
    sample_shape = (config.in_channels, height, width)
    images = image_networks(options, sample_shape, sigma_data, folder=folder)  # before the large weights: the decoder may be missing
    load_weights(transformer, read_weights(folder, component))
    merge_loras(options.loras, transformer)
    share_weights(original, transformer)
    text, notes = read_text_encoder(options, lambda: gemma_text(folder, config.caption_channels))
    return Model(
        family="sana-sprint",
        step=Step(SanaSprint(transformer, config.guidance_embeds_scale), sigma_data, "flow"),
        sample_shape=sample_shape,
        licence=folder.licence,
        sigma_data=sigma_data,
        initial_scale=sigma_data,
        times=dict(TIMES),
        conditioning=(
            Conditioning(name="prompt_embeds", kind="embedding", dtype="float32", shape=("tokens", config.caption_channels)),
            Conditioning(name="prompt_attention_mask", kind="mask", dtype="int64", shape=("tokens",)),
            Conditioning(name="guidance_scale", kind="scalar", dtype="float32", default=GUIDANCE_SCALE),
        ),
        decoder=images.decoder,
        encoder=images.encoder,
        preview=images.preview,
        text=text,
        notes=notes,
        reference=scm_scheduler(original, scheduler),
    )


def _check(config: Any, scheduler: Any) -> None:
    """Check for configurations that SanaSprintPipeline does not support. Raises CheckpointError."""
    if config.out_channels not in (None, config.in_channels):
        raise CheckpointError(f"the {TRANSFORMER} must have as many out_channels as in_channels, {config.in_channels}, got {config.out_channels}")
    if scheduler.prediction_type != "trigflow":
        raise CheckpointError(f"prediction_type of the {SCHEDULER} must be 'trigflow', got '{printable(scheduler.prediction_type)}'")
    if not isinstance(scheduler.sigma_data, float | int) or not 0 < scheduler.sigma_data < math.inf:
        raise CheckpointError(f"sigma_data of the {SCHEDULER} must be a number above 0, got {printable(scheduler.sigma_data)}")


def _set_positional_embedding(transformer: nn.Module, height: int, width: int) -> None:
    """Compute the positional embedding, which depends on the size and is not in the file. Published SANA-Sprint networks have none."""
    config: Any = transformer.config
    if config.interpolation_scale is None:
        return
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    patches: Any = transformer.get_submodule("patch_embed")
    patches.height, patches.width = height // config.patch_size, width // config.patch_size
    grid = get_2d_sincos_pos_embed(
        patches.pos_embed.shape[-1],
        (patches.height, patches.width),
        base_size=patches.base_size,
        interpolation_scale=config.interpolation_scale,
        output_type="pt",
    )
    patches.pos_embed = grid.float()[None]


# ----------------------------------------------------------------------------
# The authors' sampler, as the reference for verification.


def scm_scheduler(transformer: nn.Module, scheduler: Any) -> Reference:
    """Reference sampler: diffusers' scheduler and transformer, in the loop of SanaSprintPipeline. The pipeline itself needs the text encoder's package."""
    import diffusers
    from diffusers.schedulers import scheduling_scm

    sigma_data: float = scheduler.config.sigma_data
    guidance_unit: float = transformer.config.guidance_embeds_scale  # type: ignore[assignment,union-attr]  # diffusers' attribute

    @torch.no_grad()
    def sample(noises: Sequence[Tensor], times: tuple[float, ...], conditioning: dict[str, Tensor]) -> Tensor:
        scheduler.set_timesteps(len(times) - 1, timesteps=list(times), max_timesteps=None, intermediate_timesteps=None, device=noises[0].device)
        scheduler.set_begin_index(0)
        x = x0 = noises[0] * sigma_data
        with injected_noise(scheduling_scm, noises[1:]):
            for time in scheduler.timesteps[:-1]:
                t = time.expand(len(x))
                u = torch.sin(t) / (torch.cos(t) + torch.sin(t))
                level = u.view(-1, 1, 1, 1)
                h = x / sigma_data * torch.sqrt(level**2 + (1 - level) ** 2)
                v = transformer(
                    h,
                    encoder_hidden_states=conditioning["prompt_embeds"],
                    encoder_attention_mask=conditioning["prompt_attention_mask"],
                    guidance=conditioning["guidance_scale"] * guidance_unit,
                    timestep=u,
                    return_dict=False,
                )[0]
                F = ((1 - 2 * level) * h + (1 - 2 * level + 2 * level**2) * v) / torch.sqrt(level**2 + (1 - level) ** 2)
                x, x0 = scheduler.step(F * sigma_data, time, x, return_dict=False)
        return x0

    return Reference(f"{SCHEDULER} of diffusers {diffusers.__version__}", sample)


FAMILY = Family(
    looks_for=f"a diffusers folder of {PIPELINES[0]}, or one with a {TRANSFORMER} that has guidance_embeds",
    recognizes=recognizes_sana_sprint,
    build=build_sana_sprint,
    takes_lora=True,
    dtype="bf16",
    # Reported for SANA's published weights (diffusers issue 10336): 5e5 to 1.3e6 after attention, which diffusers clips in float16 only.
    refuses={"fp16": "SANA's attention overflows it: outputs reach a million, and the largest float16 number is 65504; use bf16 or fp32"},
)
