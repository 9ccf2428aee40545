"""The evaluator of generated digits: a small classifier, trained on digits that are not in the generators' training data.

It classifies samples, and provides the features for metrics.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from data import load_digits

FEATURES = 64
JUDGE = Path(__file__).with_name("judge.pt")  # all published figures use this one; another classifier has other units


class Judge(nn.Module):
    """A convolutional classifier over uint8 levels; its last hidden layer is the feature space."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(384, FEATURES), nn.ReLU()),
        )
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(pixels / 255)
        return features, self.head(functional.dropout(features, 0.3, self.training))


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Apply small random rotations, scalings and shifts, so that 1 000 digits are enough to train on."""
    n = len(pixels)
    angle, scale = ((torch.rand(2, n, generator=generator) - 0.5) * torch.tensor([[0.5], [0.3]])).unbind()
    shift = (torch.rand(n, 2, 1, generator=generator) - 0.5) * 0.3
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).reshape(n, 2, 2)
    grid = functional.affine_grid(torch.cat([rotation * (1 + scale)[:, None, None], shift], dim=2), list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, align_corners=False)


def load_judge(path: Path = JUDGE, steps: int = 1500) -> Judge:
    """Load the classifier at ``path``. If there is none, train it (one or two minutes on two cores) and save it there."""
    judge = Judge()
    if path.exists():
        judge.load_state_dict(torch.load(path, weights_only=True))
        return judge.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = Judge()
        _, (images, labels) = load_digits()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in range(steps):
            batch = torch.randint(len(images), (128,), generator=generator)
            loss = functional.cross_entropy(judge(augment(images[batch], generator))[1], labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    torch.save(judge.state_dict(), path)
    return judge.eval()


@torch.no_grad()
def assess(judge: Judge, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return features ``[N, 64]`` and predicted classes ``[N]`` of float levels ``[N, 1, 28, 28]``."""
    features, logits = zip(*(judge(chunk) for chunk in pixels.split(500)), strict=True)
    return torch.cat(features), torch.cat(logits).argmax(1)
