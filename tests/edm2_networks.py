"""The networks of EDM2 (arXiv 2312.02696) and of edm2_sCM, implemented directly from the papers: channels first, nothing folded or fused.

References for scm_export's networks. Module, attribute and argument names are those of the published checkpoints.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edm2_pickles import Persistent


def unit(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Normalize to an average magnitude of 1 along ``dim`` (equations 30 and 47)."""
    return x / (1e-4 + x.square().mean(dim, keepdim=True).sqrt())


def mp_silu(x: Tensor) -> Tensor:
    return functional.silu(x) / 0.596  # equation 81


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)  # equation 88


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    scale = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))  # equation 103
    return torch.cat([a * (scale * (1 - t) / math.sqrt(a.shape[1])), b * (scale * t / math.sqrt(b.shape[1]))], dim=1)


class MPFourier(Persistent, nn.Module):
    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2) * torch.cos(x[:, None] * self.freqs + self.phases)  # type: ignore[operator]  # buffers are tensors


class PositionalEmbedding(Persistent, nn.Module):
    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 10_000.0 ** -torch.linspace(0, 1, num_channels // 2))

    def forward(self, x: Tensor) -> Tensor:
        angles = x[:, None] * self.freqs  # type: ignore[operator]  # a buffer is a tensor
        return math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], dim=1)


class MPConv(Persistent, nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel: list[int]) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        w = unit(self.weight, tuple(range(1, self.weight.ndim))) * gain / math.sqrt(self.weight[0].numel())
        return functional.linear(x, w) if w.ndim == 2 else functional.conv2d(x, w, padding="same")


class Block(Persistent, nn.Module):
    """Figure 21. ``scale_shift`` is edm2_sCM's double normalization instead of EDM2's gain."""

    scale_shift = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        flavor: str = "enc",
        resample_mode: str = "keep",
        resample_filter: list[int] = [1, 1],  # noqa: B006 - as it is recorded
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
    ) -> None:
        super().__init__()
        self.out_channels, self.flavor, self.resample_mode, self.resample_filter = out_channels, flavor, resample_mode, resample_filter
        self.num_heads = out_channels // channels_per_head if attention else 0
        self.dropout, self.res_balance, self.attn_balance, self.clip_act = dropout, res_balance, attn_balance, clip_act
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, kernel=[3, 3])
        self.emb_linear = MPConv(emb_channels, out_channels * (2 if self.scale_shift else 1), kernel=[])
        if not self.scale_shift:
            self.emb_gain = nn.Parameter(torch.zeros(()))
        self.conv_res1 = MPConv(out_channels, out_channels, kernel=[3, 3])
        self.conv_skip = MPConv(in_channels, out_channels, kernel=[1, 1]) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, kernel=[1, 1]) if self.num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, kernel=[1, 1]) if self.num_heads else None

    def modulated(self, y: Tensor, emb: Tensor) -> Tensor:
        if not self.scale_shift:
            gain: Tensor = 1 + self.emb_linear(emb, self.emb_gain)
            return y * gain[:, :, None, None]
        scale, shift = (unit(half, 1)[:, :, None, None] for half in self.emb_linear(emb).chunk(2, dim=1))
        return unit(y, 1) * scale + shift

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample_mode == "down":
            x = functional.interpolate(x, scale_factor=0.5, mode="area")
        if self.resample_mode == "up":
            x = functional.interpolate(x, scale_factor=2, mode="nearest")
        skip = x if self.conv_skip is None else self.conv_skip(x)
        if self.flavor == "enc":
            x = skip = unit(skip, 1)
        y = self.conv_res1(mp_silu(self.modulated(self.conv_res0(mp_silu(x)), emb)))
        x = mp_sum(skip, y, self.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            n, c, h, w = x.shape
            q, k, v = unit(self.attn_qkv(x).reshape(n, self.num_heads, c // self.num_heads, 3, h * w), 2).permute(3, 0, 1, 4, 2)
            y = functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, c, h, w)
            x = mp_sum(x, self.attn_proj(y), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)


class TrigFlowBlock(Block):
    recorded_as = "Block"
    scale_shift = True


class UNet(Persistent, nn.Module):
    block: type[Block] = Block

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        model_channels: int = 192,
        channel_mult: list[int] = [1, 2, 3, 4],  # noqa: B006 - as it is recorded
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: list[int] = [16, 8],  # noqa: B006 - as it is recorded
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        segment_conditioning: bool = False,
        **block_kwargs: Any,
    ) -> None:
        super().__init__()
        widths = [model_channels * mult for mult in channel_mult]
        noise = model_channels * (channel_mult_noise or channel_mult[0])
        emb = model_channels * (channel_mult_emb or max(channel_mult))
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.out_gain = nn.Parameter(torch.zeros(()))
        self.embed_features(noise)
        self.emb_noise = MPConv(noise, emb, kernel=[])
        self.emb_label = MPConv(label_dim, emb, kernel=[]) if label_dim else None
        if segment_conditioning:
            self.emb_t_k = nn.Linear(noise, emb, bias=False)

        def block(cin: int, cout: int, flavor: str, res: int, **options: Any) -> Block:
            options = {"attention": res in attn_resolutions, **options}
            return self.block(cin, cout, emb, flavor=flavor, **options, **block_kwargs)

        self.enc, self.dec, skips, c = nn.ModuleDict(), nn.ModuleDict(), [], widths[0]
        for level, width in enumerate(widths):
            res = img_resolution >> level
            if level:
                self.enc[f"{res}x{res}_down"] = block(c, c, "enc", res, resample_mode="down", attention=False)
            else:
                self.enc[f"{res}x{res}_conv"] = MPConv(img_channels + 1, c, kernel=[3, 3])
            skips.append(c)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(c, width, "enc", res)
                c = width
                skips.append(c)
        for level in reversed(range(len(widths))):
            res = img_resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block(c, c, "dec", res, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(c, c, "dec", res, attention=False)
            else:
                self.dec[f"{res}x{res}_up"] = block(c, c, "dec", res, resample_mode="up", attention=False)
            for i in range(num_blocks + 1):
                self.dec[f"{res}x{res}_block{i}"] = block(c + skips.pop(), widths[level], "dec", res)
                c = widths[level]
        self.out_conv = MPConv(c, img_channels, kernel=[3, 3])

    def embed_features(self, channels: int) -> None:
        self.emb_fourier = MPFourier(channels)

    def embedding(self, noise_labels: Tensor, segment_labels: Tensor | None) -> Tensor:
        emb: Tensor = self.emb_noise(self.emb_fourier(noise_labels))
        return emb

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, segment_labels: Tensor | None = None) -> Tensor:
        emb = self.embedding(noise_labels, segment_labels)
        if self.emb_label is not None and class_labels is not None:
            emb = mp_sum(emb, self.emb_label(class_labels * math.sqrt(class_labels.shape[1])), self.label_balance)
        emb = mp_silu(emb)
        x, skips = torch.cat([x, torch.ones_like(x[:, :1])], dim=1), []
        for name, module in self.enc.items():
            x = module(x) if name.endswith("conv") else module(x, emb)
            skips.append(x)
        for name, module in self.dec.items():
            x = module(mp_cat(x, skips.pop(), self.concat_balance) if "block" in name else x, emb)
        y: Tensor = self.out_conv(x, self.out_gain)
        return y


class TrigFlowUNet(UNet):
    block = TrigFlowBlock

    def embed_features(self, channels: int) -> None:
        self.emb_pos = PositionalEmbedding(channels)

    def embedding(self, noise_labels: Tensor, segment_labels: Tensor | None) -> Tensor:
        emb: Tensor = self.emb_noise(self.emb_pos(noise_labels))
        return emb if segment_labels is None else emb + self.emb_t_k(self.emb_pos(segment_labels))


class Precond(Persistent, nn.Module):
    """NVIDIA's EDM2: ``D(x; sigma)`` (EDM, arXiv 2206.00364, table 1)."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int, use_fp16: bool = True, sigma_data: float = 0.5, **unet_kwargs: Any) -> None:
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_data = use_fp16, sigma_data
        self.unet = UNet(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim, **unet_kwargs)
        self.logvar_fourier = MPFourier(128)
        self.logvar_linear = MPConv(128, 1, kernel=[])

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        total = math.hypot(float(sigma), self.sigma_data)
        F: Tensor = self.unet(x / total, torch.log(sigma).expand(len(x)) / 4, class_labels)
        return (self.sigma_data / total) ** 2 * x + float(sigma) * self.sigma_data / total * F


class TrigFlowPrecond(Persistent, nn.Module):
    """edm2_sCM: ``f(x, t)``, or the end of the segment that starts at t_k."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int, use_fp16: bool = True, sigma_data: float = 0.5, **unet_kwargs: Any) -> None:
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_data = use_fp16, sigma_data
        self.unet = TrigFlowUNet(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim, **unet_kwargs)
        self.logvar_pos = PositionalEmbedding(128)
        self.logvar_linear = MPConv(128, 1, kernel=[])

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, t_k: Tensor | None = None) -> Tensor:
        end = torch.zeros(()) if t_k is None else t_k
        F: Tensor = self.unet(x / self.sigma_data, t.expand(len(x)), class_labels, None if t_k is None else t_k.expand(len(x)))
        return torch.cos(t - end) * x - torch.sin(t - end) * self.sigma_data * F


def filled(network: nn.Module, seed: int = 0) -> nn.Module:
    """Set weights that are initialized to zero, the gains and the segment embedding, to random values. Returns the network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gain"):
                parameter.copy_(0.5 + torch.rand((), generator=generator))
            elif name.endswith("emb_t_k.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return network
