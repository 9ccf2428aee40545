"""diffusers' UNet2DConditionModel with this project's input names, and classifier-free guidance around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scm_export.checkpoints import DiffusersFolder
from scm_export.errors import CheckpointError
from scm_runtime.bundle.manifest import Conditioning

UNET = "UNet2DConditionModel"
TIME_IDS = 6  # of SDXL: original height and width, top and left of the crop, target height and width
GUIDANCE_SCALE = 8.5  # default of LatentConsistencyModelPipeline, for U-Nets with the guidance scale as an input
CFG_SCALE = 1.5  #      for classifier-free guidance: LCM-LoRA's authors recommend 1 to 2, higher values saturate few-step models


class TextUNet(nn.Module):
    """A U-Net as ``(x, timestep, prompt_embeds, ...)`` to its prediction, ``[N, C, H, W]``.

    A U-Net with ``time_cond_proj_dim`` also takes ``guidance_scale``, and one of SDXL ``pooled_prompt_embeds``. SDXL's ``time_ids`` are those of an image that
    is not cropped and has the size that is generated, as in StableDiffusionXLPipeline.
    """

    def __init__(self, unet: nn.Module, size: tuple[int, int]) -> None:
        """Wrap a U-Net for images of a height and width in pixels."""
        super().__init__()
        self.unet = unet
        config: Any = unet.config
        # Tensors below are not buffers, whose dtype would follow the network's: angles are in the thousands and need float32. They are computed here and not
        # in the graph, because the last bit of an exponential or a sine differs between libraries.
        self.frequencies: Tensor | None = None
        if config.time_cond_proj_dim is not None:
            half = config.time_cond_proj_dim // 2
            self.frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
            self.padding = config.time_cond_proj_dim % 2
        if config.addition_embed_type == "text_time":
            own: Any = unet
            self.sizes = own.add_time_proj(torch.tensor(time_ids(size))).reshape(1, -1)
            own.get_aug_embed = self._embed_pooled

    def forward(
        self, x: Tensor, timestep: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor | None = None, guidance_scale: Tensor | None = None
    ) -> Tensor:
        w = None
        if self.frequencies is not None:
            assert guidance_scale is not None
            angles = ((guidance_scale - 1) * 1000)[:, None] * self.frequencies
            w = nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, self.padding))
        added = None if pooled_prompt_embeds is None else {"text_embeds": pooled_prompt_embeds}
        y: Tensor = self.unet(x, timestep, encoder_hidden_states=prompt_embeds, timestep_cond=w, added_cond_kwargs=added, return_dict=False)[0]
        return y

    def _embed_pooled(self, emb: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: dict[str, Tensor]) -> Tensor:
        """Replacement for the U-Net's ``get_aug_embed``, with the sinusoids of constant time_ids."""
        text = added_cond_kwargs["text_embeds"].float()
        own: Any = self.unet
        y: Tensor = own.add_embedding(torch.cat([text, self.sizes.expand(text.shape[0], -1)], dim=1))
        return y


class ClassifierFreeGuidance(nn.Module):
    """A network with a negative prompt: both branches in one batch of twice the size, as in StableDiffusionPipeline.

    A guidance scale of 1 or less gives the prompt's prediction alone, as there.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timestep: Tensor, *, guidance_scale: Tensor, **conditioning: Tensor) -> Tensor:
        doubled = double_conditioning(conditioning)
        both = self.network(torch.cat([x, x]), torch.cat([timestep, timestep]), **doubled)
        negative, positive = both.unflatten(0, (2, -1)).unbind()  # chunk(2) would fix the batch size in the traced graph
        y: Tensor = negative + guidance_scale.clamp(min=1)[:, None, None, None] * (positive - negative)
        return y


def double_conditioning(conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return conditioning for twice the batch: each ``negative_NAME`` is put before NAME."""
    return {name: torch.cat([conditioning[f"negative_{name}"], value]) for name, value in conditioning.items() if not name.startswith("negative_")}


def time_ids(size: tuple[int, int]) -> tuple[float, ...]:
    """SDXL's time_ids for images of a height and width in pixels: the original size, the corner of the crop, and the target size."""
    height, width = map(float, size)
    return (height, width, 0.0, 0.0, height, width)


def text_conditioning(config: Any, *, guidance: bool) -> tuple[Conditioning, ...]:
    """Return the inputs of a U-Net: embeddings of the prompt and, with ``guidance``, of a negative prompt; and the guidance scale if it has an effect.

    Raises:
        CheckpointError: with ``guidance``, the U-Net has the guidance scale as an input already.
    """
    if guidance and config.time_cond_proj_dim is not None:
        raise CheckpointError("--guidance is for U-Nets without time_cond_proj_dim. This one has guidance_scale as an input already: leave it out.")
    names = ("", "negative_") if guidance else ("",)
    inputs = []
    for prefix in names:
        inputs.append(Conditioning(name=f"{prefix}prompt_embeds", kind="embedding", dtype="float32", shape=("tokens", config.cross_attention_dim)))
        if config.addition_embed_type == "text_time":
            inputs.append(Conditioning(name=f"{prefix}pooled_prompt_embeds", kind="embedding", dtype="float32", shape=(pooled_size(config),)))
    if guidance or config.time_cond_proj_dim is not None:
        inputs.append(Conditioning(name="guidance_scale", kind="scalar", dtype="float32", default=CFG_SCALE if guidance else GUIDANCE_SCALE))
    return tuple(inputs)


def pooled_size(config: Any) -> int:
    """Size of the pooled embedding of an SDXL U-Net."""
    return int(config.projection_class_embeddings_input_dim) - TIME_IDS * int(config.addition_time_embed_dim)


def check_unet(config: Any, folder: DiffusersFolder, *, added: tuple[str | None, ...] = (None,)) -> None:
    """Check the configuration of a U-Net for inputs that are not supported. ``added`` are the allowed values of addition_embed_type. Raises CheckpointError."""
    where = f"of the {UNET} in {folder.describe()}"
    unused = dict.fromkeys(("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"))
    for name, value in {**unused, "out_channels": config.in_channels}.items():
        if config[name] != value:
            raise CheckpointError(f"{name} {where} must be {value!r}, got {config[name]!r}: models with more inputs are not supported")
    if config.addition_embed_type not in added:
        allowed = " or ".join(map(repr, added))
        raise CheckpointError(f"addition_embed_type {where} must be {allowed}, got {config.addition_embed_type!r}: models with more inputs are not supported")
    if not isinstance(config.cross_attention_dim, int):
        raise CheckpointError(f"cross_attention_dim {where} must be an integer, got {config.cross_attention_dim!r}")
    if config.addition_embed_type is not None and pooled_size(config) < 1:
        raise CheckpointError(
            f"projection_class_embeddings_input_dim {where} must be larger than {TIME_IDS} times addition_time_embed_dim, "
            f"got {config.projection_class_embeddings_input_dim} and {config.addition_time_embed_dim}"
        )
