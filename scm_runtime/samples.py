"""The results of a call: samples, with their seeds, their timings, and spans for tracing."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scm_runtime.common.files import output_errors, output_file
from scm_runtime.common.memory import has_room, memory_errors
from scm_runtime.common.message_text import printable
from scm_runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from PIL import Image


IMAGE_CHANNELS = (1, 3, 4)  # grayscale, RGB, RGBA
EXPORT_A_DECODER = "Decode them yourself, or export the checkpoint again with its decoder: scm-export … --decoder FOLDER"
ENCODER_ROOM, ENCODER_SHARE = 1 << 24, 16  # bytes that an encoder may allocate: at least, and in addition per byte of the image
MAX_KEYWORD = 79  # characters, of a text in a PNG
MAX_ONE_ROW = 3  # up to this many images form one row; more form a grid


@dataclass(frozen=True)
class Span:
    """A finished piece of work, in the form of a tracing span: OpenTelemetry's ``start_span(name, start_time=…)`` and ``end(end_time=…)`` take its times.

    Attributes:
        name: "generate" for a whole call; "noise", "step", "decode" or "copy" for its parts.
        start_ns: start in nanoseconds since the epoch.
        end_ns: end in nanoseconds since the epoch.
        attributes: for "generate": bundle, device, dtype, batch_size and num_inference_steps. For "step": ``step``, its index from 0.
    """

    name: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, str | int | float]


OnSpan = Callable[[Span], None]


@dataclass(frozen=True)
class Timings:
    """Wall time of one call, in seconds.

    Attributes:
        noise: drawing the noise of all steps.
        steps: each evaluation of the step graph, in order.
        decode: decoding latents to pixels; 0 if the samples are latents.
        total: the whole call with its callbacks and checks, but without making PIL images.
        copy: copying from a GPU to the host; 0 if the host computed the samples.
        waited: waiting in the queue of ``submit``, which is part of the total.
        text: encoding the prompts, which is part of the total; close to 0 if there are none.
    """

    noise: float
    steps: tuple[float, ...]
    decode: float
    total: float
    copy: float = 0.0
    waited: float = 0.0
    text: float = 0.0


@dataclass(frozen=True, eq=False, repr=False)
class Samples:
    """A batch of N samples: what a call of a Generator returns.

    Attributes:
        array: pixels, uint8 ``[N, H, W, C]``; for ``output_type="latent"`` float32 ``[N, *sample]`` in the model's scale. For "dlpack" the array may be in GPU
            memory: an object with ``shape``, ``dtype`` and ``__dlpack__`` for ``torch.from_dlpack`` and similar functions.
        seeds: seed of each sample. The same ``seed=`` generates the same sample again, alone or in any batch.
        conditioning: the model's conditioning inputs, ``[N, ...]`` each, for instance ``class_labels``.
        timings: wall time of the call and its parts.
        has_decoder: false if the bundle has no decoder: ``array`` then holds latents, whatever the ``output_type``.
    """

    array: NDArray[Any]
    seeds: tuple[int, ...]
    conditioning: dict[str, NDArray[Any]]
    timings: Timings
    has_decoder: bool = True

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.seeds)

    def __repr__(self) -> str:
        return f"Samples({self.array.dtype} {list(self.array.shape)}, seeds {listed_seeds(self.seeds)})"

    @cached_property
    def images(self) -> list[Image.Image]:
        """The samples as PIL images.

        Raises:
            InvalidArgumentError: the samples are latents.
            OutOfMemoryError: memory ran out.
        """
        self._require_pixels()
        with memory_errors(f"the images of a batch of {len(self)}"):
            from PIL import Image

            pixels = self.array[..., 0] if self.array.shape[-1] == 1 else self.array
            return [Image.fromarray(image) for image in pixels]

    def save(self, path: str | os.PathLike[str], *, columns: int | None = None, metadata: Mapping[str, str] | None = None) -> Path:
        """Save one image file: the only sample, or a grid of all samples.

        Args:
            path: the file, for instance ``"digits.png"``. Its extension selects the format; missing folders are created, an existing file is replaced.
            columns: images per row; by default the grid is about square.
            metadata: texts to store in a PNG, by keyword of 1 to 79 Latin-1 characters, such as ``{"prompt": "a cat"}``. Other formats take none.

        Returns:
            The path.

        Raises:
            InvalidArgumentError: the samples are latents, columns is below 1, the extension is not that of an image format, or metadata cannot be stored.
            OutputError: the file cannot be written. An existing file stays unchanged.
            OutOfMemoryError: memory ran out. An existing file stays unchanged.
        """
        self._require_pixels()
        if columns is not None and columns < 1:
            raise InvalidArgumentError(f"columns must be at least 1, got {columns}")
        target = Path(path)
        with memory_errors(f"{len(self)} images of {list(self.array.shape[1:])} in one file", "Save fewer images in one file"):
            image_format = image_format_of(target)
            encoded = _encode(grid(self.array, columns), image_format, target, _png_texts(metadata, image_format) if metadata else {})
        with output_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with output_file(target) as part:
                part.write_bytes(encoded.getbuffer())
        return target

    def _require_pixels(self) -> None:
        if not self.has_decoder:
            raise InvalidArgumentError(f"these samples are latents, in .array: their bundle has no decoder. {EXPORT_A_DECODER}")
        if not isinstance(self.array, np.ndarray):
            raise InvalidArgumentError("these samples are on the GPU: use output_type='pil' or 'np' to get images")
        if self.array.dtype != np.uint8:
            raise InvalidArgumentError("these samples are latents: use output_type='pil' or 'np' to get images")
        if self.array.shape[-1] not in IMAGE_CHANNELS:
            raise InvalidArgumentError(
                f"these samples have {self.array.shape[-1]} channels, images have 1, 3 or 4: use .array, or output_type='latent' for the state"
            )


def listed_seeds(seeds: Sequence[int]) -> str:
    """Return the first eight seeds as text."""
    return ", ".join(map(str, seeds[:8])) + (", …" if len(seeds) > 8 else "")


def _png_texts(metadata: Mapping[str, str], image_format: str) -> dict[str, Any]:
    """Return the argument of Pillow's ``save`` that stores texts: as tEXt chunks, or iTXt if they are not Latin-1. Raises InvalidArgumentError."""
    from PIL.PngImagePlugin import PngInfo

    if image_format != "PNG":
        raise InvalidArgumentError(f"metadata is stored in PNG files only, got {image_format}. Use .png, or leave metadata out.")
    info = PngInfo()
    for keyword, text in metadata.items():
        if not isinstance(keyword, str) or not isinstance(text, str):
            raise InvalidArgumentError(f"metadata must be strings by keyword, got {printable(keyword)}: {printable(text)}")
        try:
            if not 1 <= len(keyword.encode("latin-1")) <= MAX_KEYWORD or not keyword.isprintable():
                raise ValueError("the keyword is empty, too long or not printable")
            info.add_text(keyword, text.replace("\0", "\N{REPLACEMENT CHARACTER}"))  # a zero byte ends a text
        except ValueError as error:
            raise InvalidArgumentError(
                f"metadata must have keywords of 1 to {MAX_KEYWORD} Latin-1 characters and texts of valid Unicode, got {printable(keyword)!r}: {error}"
            ) from error
    return {"pnginfo": info}


def _encode(image: Image.Image, image_format: str, target: Path, options: Mapping[str, Any]) -> io.BytesIO:
    """Encode an image in memory: some of Pillow's encoders do not notice a full disk. Raises InvalidArgumentError if the format cannot represent it."""
    from PIL import Image

    encoded = io.BytesIO()
    size = f"{image.width} x {image.height} pixels"
    try:
        image.save(encoded, format=image_format, **options)
        with Image.open(encoded) as decoded:
            decoded_size = decoded.size
    except (OSError, ValueError) as error:
        # Encoders do not say why they failed: "bad configuration" of PNG and "encoding error 1" of WebP are memory that could not be allocated.
        if not has_room(ENCODER_ROOM + ENCODER_SHARE * image.width * image.height * len(image.getbands())):
            raise MemoryError(str(error)) from error
        raise InvalidArgumentError(f"cannot write '{target}': {image_format} cannot represent {size} of mode {image.mode} ({error}). Use .png.") from error
    if decoded_size != image.size:  # icon formats shrink an image silently
        raise InvalidArgumentError(f"cannot write '{target}': {image_format} shrinks {size} to {decoded_size[0]} x {decoded_size[1]}. Use .png.")
    return encoded


def image_format_of(path: Path) -> str:
    """Return Pillow's name of the format of a path's extension. Raises InvalidArgumentError if Pillow cannot write such a format."""
    from PIL import Image

    Image.init()
    name = Image.EXTENSION.get(path.suffix.lower())
    if name is None or name not in Image.SAVE:
        raise InvalidArgumentError(f"cannot write '{path}': unknown picture format {path.suffix!r}. Use an ending such as .png, .jpg or .webp.")
    return name


def grid(pixels: NDArray[np.uint8], columns: int | None = None) -> Image.Image:
    """Return images ``[N, H, W, C]`` as a grid, row by row; a single image unchanged."""
    from PIL import Image

    n, height, width, channels = pixels.shape
    columns = min(n, columns or (n if n <= MAX_ONE_ROW else math.ceil(math.sqrt(n))))
    rows = math.ceil(n / columns)
    sheet = np.zeros((rows * columns, height, width, channels), np.uint8)
    sheet[:n] = pixels
    sheet = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2).reshape(rows * height, columns * width, channels)
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
