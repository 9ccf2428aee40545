"""A user's own decoder, an ``nn.Module`` from latents to pixels, as a model's decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scm_export.errors import CheckpointError
from scm_runtime.common.message_text import first_line

BATCH = 2
IMAGE_CHANNELS = (1, 3, 4)


def image_shape(decoder: nn.Module, sample_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the shape ``(H, W, C)`` of the images that a decoder makes of latents of this shape, by calling it once.

    Raises:
        CheckpointError: the decoder fails, or returns something else than pixels ``[N, C, H, W]``.
    """
    what = f"the decoder {type(decoder).__name__}"
    try:
        with torch.no_grad():
            image = decoder(torch.zeros(BATCH, *sample_shape))
    except Exception as error:
        raise CheckpointError(f"{what} cannot be called with latents of {[BATCH, *sample_shape]}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(image, Tensor) or image.ndim != 4 or len(image) != BATCH or image.shape[1] not in IMAGE_CHANNELS:
        found = list(image.shape) if isinstance(image, Tensor) else f"a {type(image).__name__}"
        raise CheckpointError(f"{what} must return pixels, a tensor [N, C, H, W] with 1, 3 or 4 channels, got {found} for latents of {[BATCH, *sample_shape]}")
    _, channels, height, width = image.shape
    return height, width, channels
