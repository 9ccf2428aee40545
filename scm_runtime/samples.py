"""What a call of a Generator returns: pixels or latents, the seeds that made them, and where the time went."""

from __future__ import annotations

import io
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scm_runtime.common.files import output_errors, whole_file
from scm_runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from PIL import Image


PICTURE_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
EXPORT_A_DECODER = "Decode them yourself, or export the checkpoint again with its decoder: scm-export … --decoder FOLDER"
ONE_ROW = 3  # so many pictures stand side by side; more make a grid


@dataclass(frozen=True)
class Timings:
    """Wall time of one call, in seconds."""

    noise: float
    """All draws of noise."""
    steps: tuple[float, ...]
    """Each evaluation of the step graph."""
    decode: float
    """From latents to pixels; 0 for latents."""
    total: float
    """The whole call, callbacks and checks included; the making of PIL images is not."""
    copy: float = 0.0
    """From a GPU to the host; 0 where the work was done on the host."""
    waited: float = 0.0
    """Until work on it began: for its turn, if it was submitted. A part of the total."""


@dataclass(frozen=True, eq=False, repr=False)
class Samples:
    """A batch of N samples."""

    array: NDArray[Any]
    """uint8 ``[N, H, W, C]``; for ``output_type="latent"`` float32 ``[N, *sample]`` in the model's own scale. For "dlpack" it may lie on a GPU:
    an object with ``shape``, ``dtype`` and ``__dlpack__``, for ``torch.from_dlpack`` and its like."""
    seeds: tuple[int, ...]
    """Seed of each sample: give one back as ``seed=`` to draw that sample again, alone or in any batch."""
    conditioning: dict[str, NDArray[Any]]
    """The conditioning inputs as the model got them, ``[N, ...]`` each, for instance ``class_labels``."""
    timings: Timings
    has_decoder: bool = True
    """False: the bundle was made without one, and ``array`` holds latents whatever the ``output_type``."""

    def __len__(self) -> int:
        return len(self.seeds)

    def __repr__(self) -> str:
        seeds = ", ".join(map(str, self.seeds[:8])) + (", …" if len(self.seeds) > 8 else "")
        return f"Samples({self.array.dtype} {list(self.array.shape)}, seeds {seeds})"

    @cached_property
    def images(self) -> list[Image.Image]:
        """The samples as PIL images.

        Raises:
            InvalidArgumentError: these are latents.
        """
        self._require_pixels()
        from PIL import Image

        pixels = self.array[..., 0] if self.array.shape[-1] == 1 else self.array
        return [Image.fromarray(image) for image in pixels]

    def save(self, path: str | os.PathLike[str], *, columns: int | None = None) -> Path:
        """Write one picture: the sample itself, or a grid of all of them. The format follows the file's ending; an existing file is replaced.

        Args:
            path: where to, for instance ``"digits.png"``. Folders are made as needed.
            columns: pictures a row; by default the grid is about square.

        Returns:
            The path.

        Raises:
            InvalidArgumentError: these are latents, columns is below 1, or the path's ending names no picture format.
            OutputError: the file cannot be written. An earlier file is left as it was.
        """
        self._require_pixels()
        if columns is not None and columns < 1:
            raise InvalidArgumentError(f"columns must be at least 1, got {columns}")
        target = Path(path)
        image_format = picture_format(target)
        encoded = _encode(grid(self.array, columns), image_format, target)
        with output_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(target) as part:
                part.write_bytes(encoded.getbuffer())
        return target

    def _require_pixels(self) -> None:
        if not self.has_decoder:
            raise InvalidArgumentError(f"these samples are latents, in .array: their bundle has no decoder. {EXPORT_A_DECODER}")
        if not isinstance(self.array, np.ndarray):
            raise InvalidArgumentError("these samples lie on the GPU: ask for output_type='pil' or 'np' to get pictures")
        if self.array.dtype != np.uint8:
            raise InvalidArgumentError("these samples are latents: ask for output_type='pil' or 'np' to get pictures")
        if self.array.shape[-1] not in PICTURE_CHANNELS:
            raise InvalidArgumentError(
                f"these samples have {self.array.shape[-1]} channels, pictures have 1, 3 or 4: use .array, or the state by output_type='latent'"
            )


def _encode(picture: Image.Image, image_format: str, target: Path) -> io.BytesIO:
    """A picture's file; not on disk yet, as some of Pillow's encoders do not notice a full one. Raises InvalidArgumentError where the format cannot hold it."""
    from PIL import Image

    encoded = io.BytesIO()
    size = f"{picture.width} x {picture.height} pixels"
    try:
        picture.save(encoded, format=image_format)
        with Image.open(encoded) as kept:
            held = kept.size
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"cannot write '{target}': {image_format} does not hold {size} of mode {picture.mode} ({error}). Take .png.") from error
    if held != picture.size:  # icons are made smaller without a word
        raise InvalidArgumentError(f"cannot write '{target}': {image_format} makes {held[0]} x {held[1]} of {size}. Take .png.")
    return encoded


def picture_format(path: Path) -> str:
    """Pillow's name of the format that a path's ending asks for; raises InvalidArgumentError where it can write none such."""
    from PIL import Image

    Image.init()
    name = Image.EXTENSION.get(path.suffix.lower())
    if name is None or name not in Image.SAVE:
        raise InvalidArgumentError(f"cannot write '{path}': unknown picture format {path.suffix!r}. Use an ending such as .png, .jpg or .webp.")
    return name


def grid(pixels: NDArray[np.uint8], columns: int | None = None) -> Image.Image:
    """Pictures ``[N, H, W, C]`` side by side, row by row; one alone as it is."""
    from PIL import Image

    n, height, width, channels = pixels.shape
    columns = min(n, columns or (n if n <= ONE_ROW else math.ceil(math.sqrt(n))))
    rows = math.ceil(n / columns)
    sheet = np.zeros((rows * columns, height, width, channels), np.uint8)
    sheet[:n] = pixels
    sheet = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2).reshape(rows * height, columns * width, channels)
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
