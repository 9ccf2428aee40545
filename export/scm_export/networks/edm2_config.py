"""Configuration of the EDM2 network's architecture, and the published sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Configuration of the network's architecture. The defaults are EDM2-S for 512x512 pixels (64x64 latents), with sCM's changes."""

    img_resolution: int = 64  #                        Height and width of x.
    img_channels: int = 4  #                           Channels of x.
    label_dim: int = 1000  #                           Number of classes; 0 = unconditional.
    model_channels: int = 192  #                       Channels of the highest level.
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)  #    Width of each level, in model_channels.
    channel_mult_noise: int | None = None  #           Width of the time features, in model_channels; None = that of the highest level.
    channel_mult_emb: int | None = None  #             Width of the embedding, in model_channels; None = that of the widest level.
    num_blocks: int = 3  #                             Residual blocks per level.
    attn_resolutions: tuple[int, ...] = (16, 8)  #     Resolutions with self-attention.
    channels_per_head: int = 64  #                     Minimum size of an attention head; a narrower level has no attention.
    patch_size: int = 1  #                             Pixels per axis that are folded into channels before the first convolution.
    time_embedding: Literal["positional", "fourier"] = "positional"
    time_scale: float = 1.0  #                         Highest frequency of the positional embedding, radians per unit of c_noise.
    modulation: Literal["scale-shift", "scale"] = "scale-shift"  # sCM's double normalization, or EDM2's 1 + gain * linear(emb).
    guidance_embedding: bool = False  #                Guidance scale as an input (sCD at 512x512).
    segment_embedding: bool = False  #                 End time of the segment as an input (multistep consistency).
    label_balance: float = 0.5  #                      Weight of the label in the embedding.
    concat_balance: float = 0.5  #                     Weight of the skip connections.
    res_balance: float = 0.3  #                        Weight of the residual branch.
    attn_balance: float = 0.3  #                       Weight of the attention branch.
    clip_act: float = 256.0  #                         Bound on the magnitude of activations after each block; infinity = none.

    def validate(self) -> None:
        """Check that the values give a valid network. Raises ValueError."""
        for name in ("img_resolution", "img_channels", "model_channels", "num_blocks", "patch_size", "channels_per_head"):
            most = 100 if name == "num_blocks" else 100_000  # larger values fail inside torch
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be at least 1 and at most {most}, got {getattr(self, name)}")
        for name in ("channel_mult", "channel_mult_noise", "channel_mult_emb"):
            mults = self.channel_mult if name == "channel_mult" else (getattr(self, name) or 1,)
            if not mults or not all(1 <= mult <= 1000 for mult in mults):
                raise ValueError(f"{name} must be from 1 to 1000, got {getattr(self, name)}")
        if not 0 < self.time_scale < math.inf:
            raise ValueError(f"time_scale must be above 0 and finite, got {self.time_scale}")
        if not self.clip_act > 0:
            raise ValueError(f"clip_act must be above 0, got {self.clip_act}")
        for name in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.label_dim < 0 or self.label_dim == 1 or self.label_dim > 1_000_000:
            raise ValueError(f"label_dim must be 0 or from 2 to 1000000, got {self.label_dim}")
        if self.model_channels < 4 or self.model_channels % 2:
            raise ValueError(f"model_channels must be even and at least 4, got {self.model_channels}")
        divisor = self.patch_size << (len(self.channel_mult) - 1)
        if self.img_resolution % divisor:
            raise ValueError(f"img_resolution must be a multiple of {divisor} (patch_size and {len(self.channel_mult)} levels), got {self.img_resolution}")
        for level, mult in enumerate(self.channel_mult):
            resolution, channels = self.img_resolution // self.patch_size >> level, self.model_channels * mult
            lowest = level == len(self.channel_mult) - 1
            heads = channels // self.channels_per_head
            if (lowest or resolution in self.attn_resolutions) and heads and channels % heads:
                raise ValueError(
                    f"channels_per_head must divide the {channels} channels at resolution {resolution} into heads of equal size, "
                    f"got {self.channels_per_head}, which gives {heads} heads"
                )


# Published EDM2 networks (arXiv 2312.02696, table 6; XXS is the small model of the released code).
PRESETS: dict[str, UNetConfig] = {
    name: UNetConfig(model_channels=channels, time_embedding="fourier", modulation="scale")
    for name, channels in {"XXS": 64, "XS": 128, "S": 192, "M": 256, "L": 320, "XL": 384, "XXL": 448}.items()
}
