"""The EDM2 U-Net (arXiv 2312.02696, figure 21 and config G) with sCM's changes (arXiv 2410.11081, section 4.1), channels last.

It computes only F(x / sigma_d, c_noise(t)); the parametrisation is in ``scm_export.parametrisation``. Feature maps are ``[N, H, W, C]``;
the 3x3 convolutions use ``[N, C, H, W]`` views. Module names are those of the published checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from scm_export.networks.edm2_config import PRESETS, UNetConfig
from scm_export.networks.edm2_layers import MPConv, MPFourier, PositionalEmbedding, downsample, plain_linear, upsample
from scm_export.ops import (
    conv3x3,
    conv3x3_modulate_silu,
    conv3x3_mp_sum,
    cosine_attention,
    matmul_mp_sum,
    mp_cat_silu,
    mp_silu,
    mp_sum,
    norm_modulate_silu_columns,
    pixel_norm_silu,
)

__all__ = ["PRESETS", "PositionalEmbedding", "UNet", "UNetConfig"]

# ----------------------------------------------------------------------------
# Residual block, with optional self-attention (EDM2, figure 21).


class Block(nn.Module):
    """Base class of encoder and decoder blocks. The skip branch takes ``in_channels``, the residual branch ``res_channels``."""

    def __init__(
        self,
        in_channels: int,
        res_channels: int,
        out_channels: int,
        emb_channels: int,
        config: UNetConfig,
        *,
        resample: bool = False,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.resample = config, resample
        self.heads = out_channels // config.channels_per_head if attention else 0
        self.conv_res0 = MPConv(res_channels, out_channels, (3, 3))
        self.modulation_size = out_channels if config.modulation == "scale" else 2 * out_channels
        self.columns = (0, self.modulation_size)  # of the modulations of all blocks
        if config.modulation == "scale":
            self.emb_gain = nn.Parameter(torch.zeros(()))
        self.emb_linear: MPConv | None = MPConv(emb_channels, self.modulation_size)  # None after UNet.fold
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip = MPConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, (1, 1), groups=3) if self.heads else None
        self.attn_proj = MPConv(out_channels, out_channels, (1, 1)) if self.heads else None

    def skip(self, x: Tensor) -> Tensor:
        y: Tensor = x if self.conv_skip is None else self.conv_skip(x)
        return y

    def modulation(self, emb: Tensor) -> Tensor:
        """What the embedding modulates this block's feature map with, ``[N, modulation_size]``: scales, or scales and shifts."""
        assert self.emb_linear is not None
        y: Tensor = self.emb_linear(emb, gain=self.emb_gain) + 1 if self.config.modulation == "scale" else self.emb_linear(emb)
        return y

    def residual(self, activated: Tensor, modulations: Tensor) -> Tensor:
        """The residual branch up to its last convolution."""
        w = self.conv_res0.weight_as(activated.dtype)
        if self.config.modulation == "scale":
            return conv3x3_modulate_silu(activated, w, modulations, *self.columns)
        return norm_modulate_silu_columns(conv3x3(activated, w), modulations, *self.columns)

    def merge(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the residual branch to the skip branch, then the attention."""
        config, clip = self.config, self.config.clip_act
        x = conv3x3_mp_sum(y, self.conv_res1.weight_as(y.dtype), x, t=config.res_balance, clip=math.inf if self.heads else clip)
        if self.attn_qkv is not None and self.attn_proj is not None:
            n, h, w, c = x.shape
            y = cosine_attention(self.attn_qkv(x).reshape(n, h * w, 3 * c), self.heads).reshape(n, h, w, c)
            x = matmul_mp_sum(y, self.attn_proj.weight_as(y.dtype).flatten(1), x, t=config.attn_balance, clip=clip)
        return x


class EncoderBlock(Block):
    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, config: UNetConfig, *, resample: bool = False, attention: bool = False) -> None:
        super().__init__(in_channels, out_channels, out_channels, emb_channels, config, resample=resample, attention=attention)

    def forward(self, x: Tensor, modulations: Tensor) -> Tensor:
        x, activated = pixel_norm_silu(self.skip(downsample(x) if self.resample else x))
        return self.merge(x, self.residual(activated, modulations))


class DecoderBlock(Block):
    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, config: UNetConfig, *, resample: bool = False, attention: bool = False) -> None:
        super().__init__(in_channels, in_channels, out_channels, emb_channels, config, resample=resample, attention=attention)

    def forward(self, x: Tensor, activated: Tensor, modulations: Tensor) -> Tensor:
        """Apply the block. ``activated`` is ``mp_silu(x)``."""
        if self.resample:
            x, activated = upsample(x), upsample(activated)
        y = self.residual(activated, modulations)
        return self.merge(self.skip(x), y)


# ----------------------------------------------------------------------------
# The whole network.


class UNet(nn.Module):
    """F(x / sigma_d, c_noise, class, guidance scale, end time), with channels-last feature maps.

    ``compute_dtype`` is the dtype of the feature maps. Sines and cosines of the embeddings, norms and the result are float32.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        channels = [config.model_channels * m for m in config.channel_mult]
        resolution = config.img_resolution // config.patch_size
        x_channels = config.img_channels * config.patch_size**2
        emb_inputs = config.model_channels * (config.channel_mult_noise or config.channel_mult[0])
        emb_channels = config.model_channels * (config.channel_mult_emb or max(config.channel_mult))

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
                self.enc[f"{res}x{res}_down"] = EncoderBlock(c, c, emb_channels, config, resample=True)
            skips.append(c)
            for i in range(config.num_blocks):
                attention = res in config.attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = EncoderBlock(c, width, emb_channels, config, attention=attention)
                c = width
                skips.append(c)
        for level, width in reversed(list(enumerate(channels))):
            res = resolution >> level
            if level == len(channels) - 1:
                self.dec[f"{res}x{res}_in0"] = DecoderBlock(c, c, emb_channels, config, attention=True)
                self.dec[f"{res}x{res}_in1"] = DecoderBlock(c, c, emb_channels, config)
            else:
                self.dec[f"{res}x{res}_up"] = DecoderBlock(c, c, emb_channels, config, resample=True)
            for i in range(config.num_blocks + 1):
                attention = res in config.attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = DecoderBlock(c + skips.pop(), width, emb_channels, config, attention=attention)
                c = width
        self.emb_blocks: MPConv | None = None  # after fold, emb_linear of all blocks
        begin = 0
        for block in self.blocks:
            block.columns = (begin, begin := begin + block.modulation_size)
        self.out_conv = MPConv(c, x_channels, (3, 3))
        self.out_gain = nn.Parameter(torch.zeros(()))

    @property
    def blocks(self) -> list[Block]:
        """All residual blocks, in the order of their evaluation."""
        return [block for block in (*self.enc.values(), *self.dec.values()) if isinstance(block, Block)]

    def normalize_weights_(self) -> None:
        """Normalize the weights of every layer in place (equation 66); part of each training step."""
        for module in self.modules():
            if isinstance(module, MPConv):
                module.normalize_()

    def fold(self) -> UNet:
        """Fold weight normalization and gains into the weights, in place, and join the blocks' embedding layers, for inference and export.

        Returns the network, which can no longer be trained.
        """
        gains = {id(self.out_conv): float(self.out_gain.detach())}
        for block in self.blocks:
            if self.config.modulation == "scale":
                gains[id(block.emb_linear)] = float(block.emb_gain.detach())
        for module in self.modules():
            if isinstance(module, MPConv) and not module.folded:
                module.fold(gains.get(id(module), 1.0))
        if self.emb_blocks is None:
            self.emb_blocks = MPConv.joined([block.emb_linear for block in self.blocks if block.emb_linear is not None])
            for block in self.blocks:
                block.emb_linear = None
        return self.requires_grad_(False)

    def modulations(self, emb: Tensor) -> Tensor:
        """What the embedding modulates the blocks' feature maps with: ``[N, S]``, whose ``columns`` each block uses."""
        if self.emb_blocks is None:
            return torch.cat([block.modulation(emb) for block in self.blocks], dim=1)
        y: Tensor = self.emb_blocks(emb)
        return y + 1 if self.config.modulation == "scale" else y

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
            c_noise: ``[N]``, float32: the noise level in the unit that the network was trained with (TrigFlow: t in radians).
            class_labels: ``[N]``, int64 in [0, label_dim); -1 is not allowed. None if and only if label_dim is 0.
            guidance_scale: ``[N]``, float32; only for networks with a guidance embedding.
            t_end: ``[N]``, float32: end of the segment that contains c_noise; only for networks with a segment embedding.

        Returns:
            F, ``[N, img_channels, H, W]``, float32.
        """
        config = self.config
        emb = self.embed(c_noise, class_labels, guidance_scale, t_end).to(self.compute_dtype)
        if config.patch_size > 1:
            x = functional.pixel_unshuffle(x, config.patch_size)
        x = x.permute(0, 2, 3, 1).to(self.compute_dtype)
        modulations = self.modulations(emb)
        x = functional.pad(x, (0, 1), value=1.0)  # a channel of ones replaces the biases
        skips = []
        for block in self.enc.values():
            x = block(x) if isinstance(block, MPConv) else block(x, modulations)
            skips.append(x)
        for name, block in self.dec.items():
            x, activated = mp_cat_silu(x, skips.pop(), t=config.concat_balance) if "block" in name else (x, mp_silu(x))
            x = block(x, activated, modulations)
        x = self.out_conv(x, gain=self.out_gain).float().permute(0, 3, 1, 2)
        return functional.pixel_shuffle(x, config.patch_size) if config.patch_size > 1 else x
