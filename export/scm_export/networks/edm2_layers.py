"""Layers of the EDM2 blocks: embeddings of a scalar, layers with normalised weights, resampling. Feature maps are ``[N, H, W, C]``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from scm_export.ops import conv3x3, matmul

# ----------------------------------------------------------------------------
# Embeddings of one scalar per sample as cosines (and sines).


class PositionalEmbedding(nn.Module):
    """``sqrt(2) [cos(t f), sin(t f)]`` with frequencies f from ``scale`` down to ``scale * 1e-4``."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 1.0) -> None:
        super().__init__()
        half = channels // 2
        self.register_buffer("freqs", scale * 10.0 ** (-4 * torch.arange(half) / (half - 1)))

    def forward(self, t: Tensor) -> Tensor:
        angle = (t.float()[:, None] * self.freqs).double()  # the last bit of a float32 sine depends on the position in the batch
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
    """The weight is stored as in EDM2's checkpoints. Outputs of ``groups`` interleaved groups (EDM2's q, k, v) are computed group by group."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, ...] = (), groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))
        self.groups = groups
        self.folded = False

    @classmethod
    def joined(cls, layers: Sequence[MPConv]) -> MPConv:
        """Return one folded layer with the outputs of several folded layers without groups, one after the other."""
        weight = torch.cat([layer.weight.detach() for layer in layers])
        with torch.device("meta"):
            layer = cls(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]))
        layer.weight, layer.folded = nn.Parameter(weight), True
        return layer

    def normalized_weight(self) -> Tensor:
        """Weight in which the vector of every output has magnitude sqrt(fan_in)."""
        w = self.weight.float()
        norm: Tensor = torch.linalg.vector_norm(w, dim=tuple(range(1, w.ndim)), keepdim=True)
        return w / (1e-4 + norm / math.sqrt(w[0].numel()))

    @torch.no_grad()
    def normalize_(self) -> None:
        """Normalize the weight in place (equation 66). Call this after every optimizer step."""
        self.weight.copy_(self.normalized_weight())

    def applied_weight(self, gain: Tensor | float = 1.0) -> Tensor:
        """Weight by which inputs are multiplied."""
        w = self.normalized_weight() * (gain / math.sqrt(self.weight[0].numel()))
        return w.unflatten(0, (-1, self.groups)).transpose(0, 1).flatten(0, 1) if self.groups > 1 else w

    @torch.no_grad()
    def fold(self, gain: float = 1.0) -> None:
        """Replace the weight by :meth:`applied_weight`. The layer can no longer be trained."""
        self.weight.copy_(self.applied_weight(gain))
        self.folded = True

    def weight_as(self, dtype: torch.dtype, gain: Tensor | float = 1.0) -> Tensor:
        """Weight by which inputs of a dtype are multiplied: the stored one after :meth:`fold`, otherwise the normalized one times the gain."""
        return (self.weight if self.folded else self.applied_weight(gain)).to(dtype)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        w = self.weight_as(x.dtype, gain)
        if w.ndim == 2:
            return functional.linear(x, w)
        return conv3x3(x, w) if w.shape[-1] == 3 else matmul(x, w.flatten(1))


def plain_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """Apply a linear layer without weight normalization, in the dtype of its input."""
    return functional.linear(x, layer.weight.to(x.dtype))


# ----------------------------------------------------------------------------
# Resampling with the filter [1, 1].


def downsample(x: Tensor) -> Tensor:
    """Average each 2x2 block: ``[N, 2H, 2W, C]`` to ``[N, H, W, C]``."""
    return functional.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def upsample(x: Tensor) -> Tensor:
    """Upsample by nearest neighbour: ``[N, H, W, C]`` to ``[N, 2H, 2W, C]``."""
    _, h, w, c = x.shape
    return x[:, :, None, :, None, :].expand(-1, h, 2, w, 2, c).reshape(-1, 2 * h, 2 * w, c)  # -1: in a graph, these shapes are constants
