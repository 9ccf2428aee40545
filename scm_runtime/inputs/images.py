"""Pictures from a caller, as the encoder reads them."""

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
    """Pictures as uint8 ``[N, H, W, C]``.

    Args:
        images: a PIL image, several of them, or an array.
        shape: ``[H, W, C]`` that the encoder reads; what is no number there may be any.

    Raises:
        InvalidArgumentError: they are something else, or of another size, mode or dtype.
    """
    from PIL import Image

    expected = f"uint8 [N, {', '.join(str(size) for size in shape)}]"
    if isinstance(images, np.ndarray):
        pixels = images
    else:
        pictures = [images] if isinstance(images, Image.Image) else images
        if not isinstance(pictures, Sequence) or not all(isinstance(picture, Image.Image) for picture in pictures):
            raise InvalidArgumentError(f"images must be PIL images or an array {expected}, got {type(images).__name__}")
        if not pictures:
            raise InvalidArgumentError("images must hold at least one picture, got none")
        pixels = _stacked(pictures, shape)
    fits = pixels.ndim == 1 + len(shape) and all(size == given for size, given in zip(shape, pixels.shape[1:], strict=True) if isinstance(size, int))
    if pixels.dtype != np.uint8 or not fits:
        raise InvalidArgumentError(f"images must be {expected}, got {pixels.dtype} {list(pixels.shape)}")
    if not len(pixels):
        raise InvalidArgumentError("images must hold at least one picture, got none")
    return np.ascontiguousarray(pixels)


def _stacked(pictures: Sequence[Image.Image], shape: Sequence[int | str | None]) -> NDArray[np.uint8]:
    height, width, channels = shape
    mode = MODES.get(channels) if isinstance(channels, int) else None
    for picture in pictures:
        if mode is not None and picture.mode != mode:
            raise InvalidArgumentError(f"images must have the mode {mode}, got {picture.mode}. Convert them: image.convert({mode!r})")
        if picture.size != pictures[0].size or any(isinstance(size, int) and size != given for size, given in zip((width, height), picture.size, strict=True)):
            size = tuple(wanted if isinstance(wanted, int) else given for wanted, given in zip((width, height), pictures[0].size, strict=True))
            raise InvalidArgumentError(
                f"images must have the size {size[0]} x {size[1]}, got {picture.width} x {picture.height}. Resize them: image.resize({size})"
            )
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return pixels[..., None] if pixels.ndim == 3 else pixels
