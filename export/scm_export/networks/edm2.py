"""The EDM2 U-Net (arXiv 2312.02696, figure 21 and config G) with sCM's changes (arXiv 2410.11081, section 4.1), channels last.

It computes F(x / sigma_d, c_noise(t)) and nothing else: the parametrisation round it is ``scm_export.parametrisation``. Feature maps are
``[N, H, W, C]`` inside; only the 3x3 convolutions see ``[N, C, H, W]``, as a view. Module names are those of the published checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from scm_export.ops import cosine_attention, modulate_silu, mp_cat, mp_silu, mp_sum, norm_modulate_silu, pixel_norm


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """What fixes the network's architecture. The defaults are EDM2-S's at 512x512 pixels, that is 64x64 latents, with sCM's changes."""

    img_resolution: int = 64  #                        Height and width of x.
    img_channels: int = 4  #                           Channels of x.
    label_dim: int = 1000  #                           Number of classes; 0 = unconditional.
    model_channels: int = 192  #                       Channels of the highest level.
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)  #    Width of each level, in model_channels.
    num_blocks: int = 3  #                             Residual blocks a level.
    attn_resolutions: tuple[int, ...] = (16, 8)  #     Resolutions with self-attention.
    channels_per_head: int = 64  #                     Size of an attention head.
    patch_size: int = 1  #                             Pixels folded into channels before the first convolution, per axis.
    time_embedding: Literal["positional", "fourier"] = "positional"
    time_scale: float = 1.0  #                         Highest frequency of the positional embedding, radians per unit of c_noise.
    modulation: Literal["scale-shift", "scale"] = "scale-shift"  # sCM's double normalisation, or EDM2's 1 + gain * linear(emb).
    guidance_embedding: bool = False  #                Guidance scale as an input (sCD at 512x512).
    segment_embedding: bool = False  #                 End time of the segment as an input (multistep consistency).
    label_balance: float = 0.5  #                      Share of the label in the embedding.
    concat_balance: float = 0.5  #                     Share of the skip connections.
    res_balance: float = 0.3  #                        Share of the residual branch.
    attn_balance: float = 0.3  #                       Share of the attention branch.
    clip_act: float = 256.0  #                         Bound on the activations after each block.

    def validate(self) -> None:
        """Check that the numbers make a network; raises ValueError."""
        for name in ("img_resolution", "img_channels", "model_channels", "num_blocks", "patch_size", "channels_per_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"channel_mult must hold positive numbers, got {list(self.channel_mult)}")
        for name in ("time_scale", "clip_act"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.label_dim < 0 or self.label_dim == 1:
            raise ValueError(f"label_dim must be 0 or at least 2, got {self.label_dim}")
        if self.model_channels < 4 or self.model_channels % 2:
            raise ValueError(f"model_channels must be even and at least 4, got {self.model_channels}")
        divisor = self.patch_size << (len(self.channel_mult) - 1)
        if self.img_resolution % divisor:
            raise ValueError(f"img_resolution must be a multiple of {divisor} (patch_size and {len(self.channel_mult)} levels), got {self.img_resolution}")
        for level, mult in enumerate(self.channel_mult):
            resolution, channels = self.img_resolution // self.patch_size >> level, self.model_channels * mult
            lowest = level == len(self.channel_mult) - 1
            if (lowest or resolution in self.attn_resolutions) and channels % self.channels_per_head:
                raise ValueError(f"channels_per_head must divide the {channels} channels at resolution {resolution}, got {self.channels_per_head}")


# Widths of the published EDM2 family (arXiv 2312.02696, table 6; XXS is the small model of its released code).
PRESETS: dict[str, UNetConfig] = {
    name: UNetConfig(model_channels=channels, time_embedding="fourier", modulation="scale")
    for name, channels in {"XXS": 64, "XS": 128, "S": 192, "M": 256, "L": 320, "XL": 384, "XXL": 448}.items()
}

# ----------------------------------------------------------------------------
# Embeddings of a number as cosines (and sines).


class PositionalEmbedding(nn.Module):
    """``sqrt(2) [cos(t f), sin(t f)]`` with frequencies f from ``scale`` down to ``scale * 1e-4``."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 1.0) -> None:
        super().__init__()
        half = channels // 2
        self.register_buffer("freqs", scale * 10.0 ** (-4 * torch.arange(half) / (half - 1)))

    def forward(self, t: Tensor) -> Tensor:
        angle = (t.float()[:, None] * self.freqs).double()  # float32 sines differ in the last bit with the place in the batch
        return torch.cat([angle.cos(), angle.sin()], dim=-1).float() * math.sqrt(2)


class MPFourier(nn.Module):
    """EDM2's magnitude-preserving Fourier features with random frequencies and phases (equation 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, t: Tensor) -> Tensor:
        return torch.cos((t.float()[:, None] * self.freqs + self.phases).double()).float() * math.sqrt(2)


# ----------------------------------------------------------------------------
# Convolution or fully connected layer whose weight vectors have unit magnitude
# (equation 47): w = gain * normalize(w) / sqrt(fan_in). fold() makes it a constant.


class MPConv(nn.Module):
    """Stored as in EDM2's checkpoints. ``groups`` outputs that are stored interleaved (EDM2's q, k, v) are computed one group after the other."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, ...] = (), groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))
        self.groups = groups
        self.folded = False

    def normalized_weight(self) -> Tensor:
        """The weight with every output's vector at magnitude sqrt(fan_in)."""
        w = self.weight.float()
        norm: Tensor = torch.linalg.vector_norm(w, dim=tuple(range(1, w.ndim)), keepdim=True)
        return w / (1e-4 + norm / math.sqrt(w[0].numel()))

    @torch.no_grad()
    def normalize_(self) -> None:
        """Forced weight normalisation (equation 66): call it after every optimiser step."""
        self.weight.copy_(self.normalized_weight())

    def applied_weight(self, gain: Tensor | float = 1.0) -> Tensor:
        """The weight that inputs are multiplied with."""
        w = self.normalized_weight() * (gain / math.sqrt(self.weight[0].numel()))
        return w.unflatten(0, (-1, self.groups)).transpose(0, 1).flatten(0, 1) if self.groups > 1 else w

    @torch.no_grad()
    def fold(self, gain: float = 1.0) -> None:
        """Replace the weight by the one that is applied. The layer can no longer be trained."""
        self.weight.copy_(self.applied_weight(gain))
        self.folded = True

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        w = (self.weight if self.folded else self.applied_weight(gain)).to(x.dtype)
        if w.ndim == 4 and w.shape[-1] > 1:
            return functional.conv2d(x.permute(0, 3, 1, 2), w, padding=w.shape[-1] // 2).permute(0, 2, 3, 1)
        return functional.linear(x, w.flatten(1))


def plain_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """A layer without weight normalisation, in the dtype of its input whatever the one its weight is stored in."""
    return functional.linear(x, layer.weight.to(x.dtype))


# ----------------------------------------------------------------------------
# Resampling with the filter [1, 1].


def downsample(x: Tensor) -> Tensor:
    """Mean of each 2x2 square: ``[N, 2H, 2W, C]`` to ``[N, H, W, C]``."""
    return functional.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def upsample(x: Tensor) -> Tensor:
    """Nearest neighbour: ``[N, H, W, C]`` to ``[N, 2H, 2W, C]``."""
    n, h, w, c = x.shape
    return x[:, :, None, :, None, :].expand(n, h, 2, w, 2, c).reshape(n, 2 * h, 2 * w, c)


# ----------------------------------------------------------------------------
# Residual block, with optional self-attention (EDM2, figure 21).


class Block(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        config: UNetConfig,
        flavor: Literal["enc", "dec"],
        resample: Literal["keep", "down", "up"] = "keep",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.flavor, self.resample = config, flavor, resample
        self.heads = out_channels // config.channels_per_head if attention else 0
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, (3, 3))
        if config.modulation == "scale":
            self.emb_gain = nn.Parameter(torch.zeros(()))
            self.emb_linear = MPConv(emb_channels, out_channels)
        else:
            self.emb_linear = MPConv(emb_channels, 2 * out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip = MPConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, (1, 1), groups=3) if self.heads else None
        self.attn_proj = MPConv(out_channels, out_channels, (1, 1)) if self.heads else None

    def modulate(self, y: Tensor, emb: Tensor) -> Tensor:
        if self.config.modulation == "scale":
            gain = 1.0 if self.emb_linear.folded else self.emb_gain
            return modulate_silu(y, self.emb_linear(emb, gain=gain) + 1)
        scale, shift = self.emb_linear(emb).chunk(2, dim=-1)
        return norm_modulate_silu(y, pixel_norm(scale), pixel_norm(shift))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample != "keep":
            x = downsample(x) if self.resample == "down" else upsample(x)
        if self.flavor == "enc":
            x = pixel_norm(x if self.conv_skip is None else self.conv_skip(x))
        y = self.conv_res1(self.modulate(self.conv_res0(mp_silu(x)), emb))
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        clip = self.config.clip_act
        x = mp_sum(x, y, t=self.config.res_balance, clip=None if self.heads else clip)
        if self.attn_qkv is not None and self.attn_proj is not None:
            n, h, w, c = x.shape
            y = cosine_attention(self.attn_qkv(x).reshape(n, h * w, 3 * c), self.heads).reshape(n, h, w, c)
            x = mp_sum(x, self.attn_proj(y), t=self.config.attn_balance, clip=clip)
        return x


# ----------------------------------------------------------------------------
# The whole network.


class UNet(nn.Module):
    """F(x / sigma_d, c_noise, class, guidance scale, end time), channels last inside.

    ``compute_dtype`` is the dtype of the feature maps; the embeddings' sines and cosines, the norms and the result are float32.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        channels = [config.model_channels * m for m in config.channel_mult]
        resolution = config.img_resolution // config.patch_size
        x_channels = config.img_channels * config.patch_size**2
        emb_inputs, emb_channels = config.model_channels, max(channels)

        if config.time_embedding == "positional":
            self.emb_pos: PositionalEmbedding | None = PositionalEmbedding(emb_inputs, config.time_scale)
            self.emb_fourier: MPFourier | None = None
        else:
            self.emb_pos, self.emb_fourier = None, MPFourier(emb_inputs)
        self.emb_noise = MPConv(emb_inputs, emb_channels)
        self.emb_t_k = nn.Linear(emb_inputs, emb_channels, bias=False) if config.segment_embedding else None
        self.emb_guidance = nn.Linear(emb_inputs, emb_channels, bias=False) if config.guidance_embedding else None
        self.emb_label = MPConv(config.label_dim, emb_channels) if config.label_dim else None

        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        c, skips = x_channels + 1, []
        for level, width in enumerate(channels):
            res = resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = MPConv(c, width, (3, 3))
                c = width
            else:
                self.enc[f"{res}x{res}_down"] = Block(c, c, emb_channels, config, "enc", "down")
            skips.append(c)
            for i in range(config.num_blocks):
                attention = res in config.attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = Block(c, width, emb_channels, config, "enc", attention=attention)
                c = width
                skips.append(c)
        for level, width in reversed(list(enumerate(channels))):
            res = resolution >> level
            if level == len(channels) - 1:
                self.dec[f"{res}x{res}_in0"] = Block(c, c, emb_channels, config, "dec", attention=True)
                self.dec[f"{res}x{res}_in1"] = Block(c, c, emb_channels, config, "dec")
            else:
                self.dec[f"{res}x{res}_up"] = Block(c, c, emb_channels, config, "dec", "up")
            for i in range(config.num_blocks + 1):
                attention = res in config.attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = Block(c + skips.pop(), width, emb_channels, config, "dec", attention=attention)
                c = width
        self.out_conv = MPConv(c, x_channels, (3, 3))
        self.out_gain = nn.Parameter(torch.zeros(()))

    def normalize_weights_(self) -> None:
        """Forced weight normalisation of every layer (equation 66); part of each training step."""
        for module in self.modules():
            if isinstance(module, MPConv):
                module.normalize_()

    def fold(self) -> UNet:
        """Turn weight normalisation and gains into constants, in place; for inference and export."""
        gains = {id(self.out_conv): float(self.out_gain.detach())}
        for module in self.modules():
            if isinstance(module, Block) and self.config.modulation == "scale":
                gains[id(module.emb_linear)] = float(module.emb_gain.detach())
        for module in self.modules():
            if isinstance(module, MPConv) and not module.folded:
                module.fold(gains.get(id(module), 1.0))
        return self.requires_grad_(False)

    def embed(self, c_noise: Tensor, class_labels: Tensor | None, guidance_scale: Tensor | None, t_end: Tensor | None) -> Tensor:
        features = self.emb_pos if self.emb_pos is not None else self.emb_fourier
        assert features is not None
        emb: Tensor = self.emb_noise(features(c_noise))
        if self.emb_t_k is not None:
            if t_end is None:
                raise ValueError("this network has a segment embedding: t_end must be given, got None")
            emb = emb + plain_linear(features(t_end), self.emb_t_k)
        if self.emb_guidance is not None:
            if guidance_scale is None:
                raise ValueError("this network has a guidance embedding: guidance_scale must be given, got None")
            emb = emb + plain_linear(features(guidance_scale), self.emb_guidance)
        if self.emb_label is not None:
            if class_labels is None:
                raise ValueError(f"this network is conditional on {self.config.label_dim} classes: class_labels must be given, got None")
            one_hot = functional.one_hot(class_labels, self.config.label_dim).to(emb.dtype)
            emb = mp_sum(emb, self.emb_label(one_hot * math.sqrt(self.config.label_dim)), t=self.config.label_balance)
        return mp_silu(emb)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        class_labels: Tensor | None = None,
        guidance_scale: Tensor | None = None,
        t_end: Tensor | None = None,
    ) -> Tensor:
        """Evaluate F.

        Args:
            x: ``[N, img_channels, H, W]``, float32: the state divided by sigma_d.
            c_noise: ``[N]``, float32: the noise level as the network was trained to read it (TrigFlow: t in radians).
            class_labels: ``[N]``, int64 in [0, label_dim); -1 is not a class. None exactly when label_dim is 0.
            guidance_scale: ``[N]``, float32; only with a guidance embedding.
            t_end: ``[N]``, float32: end of the segment that c_noise lies in; only with a segment embedding.

        Returns:
            F, ``[N, img_channels, H, W]``, float32.
        """
        config = self.config
        emb = self.embed(c_noise, class_labels, guidance_scale, t_end).to(self.compute_dtype)
        if config.patch_size > 1:
            x = functional.pixel_unshuffle(x, config.patch_size)
        x = x.permute(0, 2, 3, 1).to(self.compute_dtype)
        x = functional.pad(x, (0, 1), value=1.0)  # a channel of ones, in place of biases
        skips = []
        for block in self.enc.values():
            x = block(x) if isinstance(block, MPConv) else block(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop(), t=config.concat_balance)
            x = block(x, emb)
        x = self.out_conv(x, gain=self.out_gain).float().permute(0, 3, 1, 2)
        return functional.pixel_shuffle(x, config.patch_size) if config.patch_size > 1 else x
