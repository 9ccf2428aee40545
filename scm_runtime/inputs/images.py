"""Validation of images, and their conversion to the pixels that the encoder reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scm_runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from PIL import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_pixels(images: Any, shape: Sequence[int | str | None]) -> NDArray[np.uint8]:
    """Return images as uint8 ``[N, H, W, C]``.

    Args:
        images: a PIL image, a sequence of them, or an array.
        shape: ``[H, W, C]`` of the encoder's input; dimensions that are not integers are dynamic.

    Raises:
        InvalidArgumentError: the images have another type, size, mode or dtype.
    """
    from PIL import Image

    expected = f"uint8 [N, {', '.join(str(size) for size in shape)}]"
    if isinstance(images, np.ndarray):
        pixels = images
    else:
        sequence = [images] if isinstance(images, Image.Image) else images
        if not isinstance(sequence, Sequence) or not all(isinstance(image, Image.Image) for image in sequence):
            raise InvalidArgumentError(f"images must be PIL images or an array {expected}, got {type(images).__name__}")
        if not sequence:
            raise InvalidArgumentError("images must hold at least one image, got none")
        pixels = _stack(sequence, shape)
    fits = pixels.ndim == 1 + len(shape) and all(size == given for size, given in zip(shape, pixels.shape[1:], strict=True) if isinstance(size, int))
    if pixels.dtype != np.uint8 or not fits:
        raise InvalidArgumentError(f"images must be {expected}, got {pixels.dtype} {list(pixels.shape)}")
    if not len(pixels):
        raise InvalidArgumentError("images must hold at least one image, got none")
    return np.ascontiguousarray(pixels)


def _stack(images: Sequence[Image.Image], shape: Sequence[int | str | None]) -> NDArray[np.uint8]:
    height, width, channels = shape
    mode = MODES.get(channels) if isinstance(channels, int) else None
    for image in images:
        if mode is not None and image.mode != mode:
            raise InvalidArgumentError(f"images must have the mode {mode}, got {image.mode}. Convert them: image.convert({mode!r})")
        if image.size != images[0].size or any(isinstance(size, int) and size != given for size, given in zip((width, height), image.size, strict=True)):
            size = tuple(wanted if isinstance(wanted, int) else given for wanted, given in zip((width, height), images[0].size, strict=True))
            raise InvalidArgumentError(
                f"images must have the size {size[0]} x {size[1]}, got {image.width} x {image.height}. Resize them: image.resize({size})"
            )
    pixels = np.stack([np.asarray(image) for image in images])
    return pixels[..., None] if pixels.ndim == 3 else pixels
