"""Networks as researchers write them for training: labels under another name, classifier-free guidance in one doubled batch, control flow, autocast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SHAPE = (3, 6, 6)
NO_CLASS = 4  # the label of the unconditional branch


class Base(nn.Module):
    """A convolution, modulated by level and label."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.classes, self.level = nn.Conv2d(3, 3, 3, padding=1), nn.Embedding(NO_CLASS + 1, 3), nn.Linear(1, 3)

    def network(self, x: Tensor, level: Tensor, labels: Tensor) -> Tensor:
        y: Tensor = self.conv(x) + (self.classes(labels) + self.level(level[:, None]))[:, :, None, None]
        return y

    def doubled(self, x: Tensor, level: Tensor, labels: Tensor) -> Tensor:
        """Both branches of classifier-free guidance, in one batch of twice the size."""
        return self.network(torch.cat([x, x]), torch.cat([level, level]), torch.cat([labels, torch.full_like(labels, NO_CLASS)]))


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    return unconditional + scale[:, None, None, None] * (conditional - unconditional)


class Labelled(Base):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.network(x, t, y)


class TwoLabels(Base):
    def forward(self, x: Tensor, t: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.network(x, t, y) + self.network(x, t, z)


class TwoBranches(Base):
    """One call per branch."""

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, guidance_scale: Tensor) -> Tensor:
        return guide(self.network(x, t, class_labels), self.network(x, t, torch.full_like(class_labels, NO_CLASS)), guidance_scale)


class Chunked(Base):
    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, guidance_scale: Tensor) -> Tensor:
        conditional, unconditional = self.doubled(x, t, class_labels).chunk(2)
        return guide(conditional, unconditional, guidance_scale)


class ChunkedByKeyword(Base):
    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, guidance_scale: Tensor) -> Tensor:
        conditional, unconditional = torch.chunk(self.doubled(x, t, class_labels), chunks=2, dim=-4)
        return guide(conditional, unconditional, guidance_scale)


class Split(Base):
    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, guidance_scale: Tensor) -> Tensor:
        conditional, unconditional = self.doubled(x, t, class_labels).split(x.shape[0])
        return guide(conditional, unconditional, guidance_scale)


class SplitInHalf(Base):
    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, guidance_scale: Tensor) -> Tensor:
        y = self.doubled(x, t, class_labels)
        conditional, unconditional = torch.split(y, y.shape[0] // 2, dim=0)
        return guide(conditional, unconditional, guidance_scale)


# ----------------------------------------------------------------------------
# Networks that no graph can compute for every batch and every value.


class SplitByLength(Base):
    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, guidance_scale: Tensor) -> Tensor:
        conditional, unconditional = self.doubled(x, t, class_labels).split(len(x))  # len() returns an int
        return guide(conditional, unconditional, guidance_scale)


class SplitByInt(Base):
    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, guidance_scale: Tensor) -> Tensor:
        n = int(x.shape[0])
        conditional, unconditional = self.doubled(x, t, class_labels).split(n)
        return guide(conditional, unconditional, guidance_scale)


class Loop(Base):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.network(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(x.shape[0])])


class Branch(Base):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if t.max() > 1:
            x = 2 * x
        return self.network(x, t, y)


class Item(Base):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.network(x, t, y)[:, :, : 6 + int(y.sum().item()) * 0]


class Untranslatable(Base):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.network(x + torch.linalg.eigvals(x).real.sum(), t, y)


class Autocast(Base):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.network(x, t, y)


class AutocastOff(Base):
    """Regions in which autocast is off, and regions for a GPU, change nothing on a CPU."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return self.network(x, t, y)


class Decoder(nn.Module):
    """Latents to pixels of twice the size."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 3, 2, stride=2)

    def forward(self, latents: Tensor) -> Tensor:
        y: Tensor = self.up(latents).tanh()
        return y


def decoder() -> nn.Module:
    torch.manual_seed(1)
    return Decoder()


def flat_decoder() -> nn.Module:
    return nn.Flatten()


def failing_decoder() -> nn.Module:
    return nn.Conv2d(7, 3, 1)
