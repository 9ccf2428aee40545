"""Networks of a user of the family ``module``: two levels, two heads, odd widths, every kind of conditioning. Also objects that are not valid factories."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

SHAPE = (3, 10, 14)
CLASSES = 5
TOKENS = 8  # size of a token embedding
NOT_A_FUNCTION = 7


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(3, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.shift = nn.Linear(18, width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y: Tensor = x + self.conv(functional.silu(self.norm(x) + self.shift(embedding)[:, :, None, None]))
        return y


class OwnNetwork(nn.Module):
    """A network with a time embedding, classes, a guidance scale and masked text: convolutions on two levels, attention to the text on the lower one."""

    def __init__(self) -> None:
        super().__init__()
        self.freqs = nn.Buffer(torch.tensor([1.0, 5.0, 25.0, 125.0]))
        self.time_embed = nn.Sequential(nn.Linear(9, 18), nn.SiLU(), nn.Linear(18, 18))
        self.classes = nn.Embedding(CLASSES, 18)
        self.conv_in = nn.Conv2d(3, 9, 3, padding=1)
        self.high, self.low = Block(9), Block(18)
        self.down, self.up = nn.Conv2d(9, 18, 2, stride=2), nn.ConvTranspose2d(18, 9, 2, stride=2)
        self.query, self.key_value = nn.Linear(18, 18), nn.Linear(TOKENS, 36)
        self.conv_out = nn.Conv2d(18, 3, 3, padding=1)

    def forward(self, x: Tensor, level: Tensor, class_labels: Tensor, guidance: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        angles = level[:, None] * self.freqs
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin(), guidance[:, None]], dim=1)) + self.classes(class_labels)
        skip = self.high(self.conv_in(x), embedding)
        h = self.low(self.down(skip), embedding)
        n, c, height, width = h.shape
        query = self.query(h.flatten(2).mT).reshape(n, height * width, 2, 9).transpose(1, 2)
        key, value = self.key_value(text).reshape(n, -1, 2, 18).transpose(1, 2).chunk(2, dim=-1)
        mask = text_mask.to(torch.bool)[:, None, None, :]
        h = h + functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).reshape(n, height * width, c).mT.reshape(h.shape)
        y: Tensor = self.conv_out(torch.cat([skip, self.up(h)], dim=1))
        return y


class Plain(nn.Module):
    """A network without conditioning. ``how`` selects the structure of its return value."""

    def __init__(self, how: str = "tensor", channels: int = 3) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(3, channels, 3, padding=1)

    def forward(self, x: Tensor, level: Tensor) -> object:
        y = self.conv(x) * level[:, None, None, None]
        return {"tensor": y, "tuple": (y, level), "dict": {"sample": y}, "nested": ([y], level), "nothing": None}[self.how]


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.angles = nn.Linear(1, 6)

    def forward(self, level: Tensor) -> Tensor:
        y: Tensor = self.angles(level[:, None] * 123).sin()
        return y


class Sensitive(nn.Module):
    """A network whose time embedding needs more precision than bfloat16 has."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = Waves()
        self.conv, self.out = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        y: Tensor = self.out(self.conv(x) * self.time_embed(level)[:, :, None, None])
        return y


class DataDependent(nn.Module):
    """A network that cannot be traced: its control flow depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        y: Tensor = self.conv(x) * (2.0 if level.max().item() > 1 else 1.0)
        return y


class Counts(nn.Module):
    """Computes numbers from sizes, with every way of rounding that TorchScript has."""

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        cut, low, high = int(x.shape[2] * 0.7), math.floor(x.shape[3] * 0.35), math.ceil(x.shape[3] * 0.35)
        digits = cut + 10 * low + 100 * high + 1000 * (x.shape[2] // 3) + 10000 * (x.shape[2] % 3)
        return x + torch.zeros(low).numel() + digits + level[:, None, None, None]


def own() -> nn.Module:
    return OwnNetwork()


def plain(how: str = "tensor", channels: int = 3) -> nn.Module:
    return Plain(how, channels)


def sensitive() -> nn.Module:
    return Sensitive()


class FromDiffusers(nn.Module):
    """A U-Net of diffusers, whose upsampling depends on the batch size, with this project's argument order."""

    def __init__(self) -> None:
        super().__init__()
        import diffusers

        self.unet = diffusers.UNet2DModel(
            sample_size=(8, 16),
            block_out_channels=(12, 24),
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            norm_num_groups=3,
        )

    def forward(self, x: Tensor, level: Tensor) -> object:
        return self.unet(x, level * 1000)


def from_diffusers() -> nn.Module:
    return FromDiffusers()


def data_dependent() -> nn.Module:
    return DataDependent()


def raising() -> nn.Module:
    raise KeyError("no such width")


def a_state_dict() -> object:
    return Plain().state_dict()
