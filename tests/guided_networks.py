"""Networks as researchers write them for training: labels under another name, classifier-free guidance in one doubled batch, control flow, autocast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SHAPE = (3, 6, 10)
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
