"""Conversion between latents and images: diffusers' autoencoders as a model's decoder, encoder and preview decoder.

Families call :func:`image_networks`. The autoencoder comes from ``--decoder FOLDER`` or from the checkpoint's pipeline folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from scm_export.checkpoints import DiffusersFolder
from scm_export.checkpoints.diffusers_folder import is_diffusers_folder
from scm_export.errors import CheckpointError
from scm_export.families.diffusers_networks import make_batch_dynamic, make_network, read_weights
from scm_export.families.family import BuildOptions
from scm_export.families.own_decoder import image_shape
from scm_export.families.weights import load_weights
from scm_export.model import Decoder, ImageDecoder, ImageNetwork, Latents
from scm_export.ops import to_image
from scm_export.precision import Precision
from scm_runtime.common.message_text import first_line

TINY = "AutoencoderTiny"

# Submodules for decoding and encoding, in order of application. Not every autoencoder has the convolutions next to the latents.
AUTOENCODERS: dict[str, dict[str, tuple[str, ...]]] = {
    "AutoencoderKL": {"decode": ("post_quant_conv", "decoder"), "encode": ("encoder", "quant_conv")},
    "AutoencoderDC": {"decode": ("decoder",), "encode": ("encoder",)},
    TINY: {"decode": ("decoder",), "encode": ("encoder",)},
}


class Factors(NamedTuple):
    """diffusers' scaling of an autoencoder's latents: ``scaled = (latent - shift) * scale``."""

    scale: float
    shift: float


SD_FACTORS = Factors(0.18215, 0.0)  # Stable Diffusion's autoencoder
PIXELS = (127.5, 127.5)  # pixels in [-1, 1]


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of an autoencoder's latents per channel, for models trained on normalized latents.

    ``latent = x * std / sigma_data + mean``.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


SCM_STATISTICS = LatentStatistics((1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31))
"""sCM's statistics for latents of sd-vae-ft-mse, for images in [-1, 1] (arXiv 2410.11081, appendix on ImageNet 512x512)."""


class ImageNetworks(NamedTuple):
    """The networks that convert between a model's state and images."""

    decoder: Decoder
    encoder: ImageNetwork | None
    preview: ImageNetwork | None


def image_networks(
    options: BuildOptions,
    sample_shape: tuple[int, ...],
    sigma_data: float,
    *,
    folder: DiffusersFolder | None = None,
    statistics: LatentStatistics | None = None,
    pixels: tuple[float, float] = PIXELS,
) -> ImageNetworks:
    """Build the decoder of a latent model and, if requested, its encoder and preview decoder.

    Args:
        options: only ``decoder``, ``latents``, ``with_encoder`` and ``preview_decoder`` are used.
        sample_shape: shape of the state of one sample, ``[C, H, W]``.
        sigma_data: the state is sigma_data times latents of about unit variance.
        folder: the checkpoint's folder; its autoencoder is used if the options have none.
        statistics: mean and standard deviation with which the latents were normalized; None for diffusers' normalization,
            ``(latent - shift_factor) * scaling_factor``, with the factors of the autoencoder.
        pixels: scale and offset from the autoencoder's pixels to uint8 levels; the default is for pixels in [-1, 1].

    Raises:
        CheckpointError: there is no decoder, or an autoencoder does not fit the state.
    """
    if isinstance(options.decoder, nn.Module):
        return _own_networks(options.decoder, options, sample_shape, sigma_data, statistics, pixels)
    own = folder if folder is not None and folder.find(*AUTOENCODERS) is not None else None
    source = own if options.decoder is None else _open_autoencoder(options.decoder, "--decoder")
    if source is None and (options.with_encoder or not options.latents):
        what, instead = ("encoder", "") if options.latents else ("decoder", ", or export a sampler of latents with --latents")
        raise CheckpointError(
            f"missing {what}: this is a latent model, {list(sample_shape)}, and its checkpoint has no autoencoder. "
            f"Give the autoencoder's folder, as diffusers saves it, with --decoder FOLDER{instead}."
        )
    _check_statistics(statistics, sample_shape[0])
    trained_on = None if source is None else _Autoencoder(source)
    decoder: Decoder = Latents()
    encoder = preview = None
    if trained_on is not None:
        latents, image_shape = _latent_affine(trained_on, trained_on, sigma_data, statistics, sample_shape[0]), trained_on.image_shape(sample_shape)
        if not options.latents:
            decoder = ImageNetwork(LatentsToImage(trained_on.half("decode"), latents, pixels), image_shape)
        if options.with_encoder:
            encoder = ImageNetwork(ImageToLatents(trained_on.half("encode"), latents, pixels), image_shape)
    if options.preview_decoder is not None:
        small = _Autoencoder(_open_autoencoder(options.preview_decoder, "--preview-decoder"))
        latents, image_shape = _latent_affine(small, trained_on, sigma_data, statistics, sample_shape[0]), small.image_shape(sample_shape)
        preview = ImageNetwork(LatentsToImage(small.half("decode"), latents, pixels), image_shape)
    return ImageNetworks(decoder, encoder, preview)


def _own_networks(
    network: nn.Module,
    options: BuildOptions,
    sample_shape: tuple[int, ...],
    sigma_data: float,
    statistics: LatentStatistics | None,
    pixels: tuple[float, float],
) -> ImageNetworks:
    """The image networks with a user's decoder. Without statistics, its latents are the state divided by sigma_data."""
    if options.with_encoder or options.preview_decoder is not None or options.latents:
        raise CheckpointError("a decoder that is a network excludes --with-encoder, --preview-decoder and --latents, which need the folder of an autoencoder")
    _check_statistics(statistics, sample_shape[0])
    network = network.eval().requires_grad_(False).float()
    mean, std = (statistics.mean, statistics.std) if statistics is not None else ((0.0,) * sample_shape[0], (1.0,) * sample_shape[0])
    latents = Affine(torch.tensor(std, dtype=torch.float64) / sigma_data, torch.tensor(mean, dtype=torch.float64))
    decode = LatentsToImage(network, latents, pixels, promote_dtypes=True)
    return ImageNetworks(ImageNetwork(decode, image_shape(network, sample_shape)), None, None)


def _check_statistics(statistics: LatentStatistics | None, channels: int) -> None:
    if statistics is not None and not len(statistics.mean) == len(statistics.std) == channels:
        raise CheckpointError(f"latent_mean and latent_std must have one value per channel, {channels}, got {statistics.mean} and {statistics.std}")


def pixel_networks(options: BuildOptions, sample_shape: tuple[int, ...], pixels: tuple[float, float] = PIXELS) -> ImageNetworks:
    """Build the decoder, and if requested the encoder, of a model whose state is an image.

    Args:
        options: only ``latents`` and ``with_encoder`` are used.
        sample_shape: shape of the state of one sample, ``[C, H, W]``.
        pixels: scale and offset of ``level = x * scale + offset``.

    Raises:
        CheckpointError: the options name an autoencoder.
    """
    for option, given in (("--decoder", options.decoder), ("--preview-decoder", options.preview_decoder)):
        if given is not None:
            raise CheckpointError(f"{option} is for latent models; this one samples pixels, {list(sample_shape)}: leave it out")
    channels, height, width = sample_shape
    encoder = ImageNetwork(ImageToPixels(pixels), (height, width, channels)) if options.with_encoder else None
    return ImageNetworks(Latents() if options.latents else ImageDecoder(*pixels), encoder, None)


def downsampling(options: BuildOptions, folder: DiffusersFolder, default: int) -> int:
    """Return the number of pixels per latent along each axis, or ``default`` if there is no autoencoder.

    Raises:
        CheckpointError: ``--decoder`` is not an autoencoder.
    """
    if isinstance(options.decoder, nn.Module):
        raise CheckpointError("--decoder must be the folder of an autoencoder for this family, got a network")
    source = folder if options.decoder is None else _open_autoencoder(options.decoder, "--decoder")
    return default if source.find(*AUTOENCODERS) is None else _Autoencoder(source).downsampling


class Affine(NamedTuple):
    """Conversion of a state to an autoencoder's latents per channel, ``latent = x * scale + shift``. Both are float64 ``[C]``."""

    scale: Tensor
    shift: Tensor


class LatentsToImage(nn.Module):
    """Decodes x, float32 ``[N, C, H, W]``, to images, uint8 ``[N, H', W', C']``."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, latents: Affine, pixels: tuple[float, float], *, promote_dtypes: bool = False) -> None:
        super().__init__()
        self.network, self.pixels = Precision(network, promote_dtypes=promote_dtypes), pixels
        self.register_buffer("scale", latents.scale.float().reshape(-1, 1, 1))
        self.register_buffer("shift", latents.shift.float().reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return to_image(self.network(x * self.scale + self.shift), *self.pixels)


class ImageToLatents(nn.Module):
    """Encodes images, uint8 ``[N, H', W', C']``, to x, float32 ``[N, C, H, W]``; the mean if the autoencoder predicts a distribution."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, latents: Affine, pixels: tuple[float, float]) -> None:
        super().__init__()
        self.pixels, self.network = ImageToPixels(pixels), Precision(network)
        self.register_buffer("scale", (1 / latents.scale).float().reshape(-1, 1, 1))
        self.register_buffer("shift", (-latents.shift / latents.scale).float().reshape(-1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        moments = self.network(self.pixels(image))
        x: Tensor = moments[:, : len(self.scale)] * self.scale + self.shift
        return x


class ImageToPixels(nn.Module):
    """Converts images, uint8 ``[N, H, W, C]``, to pixels x, float32 ``[N, C, H, W]``."""

    def __init__(self, pixels: tuple[float, float]) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, image: Tensor) -> Tensor:
        scale, offset = self.pixels
        return (image.permute(0, 3, 1, 2).float() - offset) / scale


def _open_autoencoder(path: Path, option: str) -> DiffusersFolder:
    if not is_diffusers_folder(path):
        exists = "" if path.exists() else ", which does not exist. A repository of the hub has the form org/name, such as stabilityai/sd-vae-ft-mse"
        raise CheckpointError(f"{option} must be the folder of an autoencoder as diffusers saves it, with config.json and weights; got '{path}'{exists}")
    folder = DiffusersFolder(path)
    if folder.find(*AUTOENCODERS) is None:
        raise CheckpointError(f"{option} must hold one of {', '.join(AUTOENCODERS)}, got {folder.describe()}")
    return folder


class _Autoencoder:
    """An autoencoder in a folder. Its weights are read by :meth:`half`."""

    def __init__(self, folder: DiffusersFolder) -> None:
        component = folder.find(*AUTOENCODERS)
        assert component is not None
        self.folder, self.component, self.kind = folder, component, folder.classes[component]
        self.network = make_network(folder, component)
        make_batch_dynamic(self.network)
        config: Any = self.network.config
        self.latent_channels = int(config.latent_channels)
        self.factors = Factors(float(config.scaling_factor), float(config.get("shift_factor") or 0.0))

    @property
    def downsampling(self) -> int:
        """Number of pixels per latent along each axis."""
        return self.image_shape((self.latent_channels, 8, 8))[0] // 8

    def half(self, direction: Literal["encode", "decode"]) -> nn.Module:
        """Return the encoder or the decoder with its weights, on the CPU. Raises CheckpointError."""
        half = _Half(self.network, AUTOENCODERS[self.kind][direction])
        try:
            load_weights(half, read_weights(self.folder, self.component, *half.names))
        except CheckpointError as error:
            raise CheckpointError(f"the {self.kind} in '{self.folder.path}': {first_line(error)}") from error
        return half

    def image_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape ``(H, W, C)`` of an image whose latents have this shape, by running both halves on the meta device.

        Raises:
            CheckpointError: no image has latents of this shape.
        """
        try:
            image = _Half(self.network, AUTOENCODERS[self.kind]["decode"])(torch.empty(1, *sample_shape, device="meta"))
            latents = _Half(self.network, AUTOENCODERS[self.kind]["encode"])(image)[0, : sample_shape[0]]
            if latents.shape != sample_shape:
                raise ValueError(f"an image of {list(image.shape[1:])} has latents of {list(latents.shape)}")
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"the {self.kind} in '{self.folder.path}' does not fit the model's latents, {list(sample_shape)}: {first_line(error)}"
            ) from error
        channels, height, width = image.shape[1:]
        return height, width, channels


class _Half(nn.Module):
    """Submodules of an autoencoder, applied in order. They keep their names, so that the state_dict matches the file."""

    def __init__(self, autoencoder: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        children = dict(autoencoder.named_children())
        self.names = [name for name in names if name in children]
        for name in self.names:
            self.add_module(name, children[name])

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x


def _latent_affine(autoencoder: _Autoencoder, trained_on: _Autoencoder | None, sigma_data: float, statistics: LatentStatistics | None, channels: int) -> Affine:
    """Return the conversion of a model's state to the latents of an autoencoder.

    The model was trained on the latents of ``trained_on``, which may be another autoencoder or None if it is unknown.
    """
    own = autoencoder.factors
    if statistics is None:
        return Affine(*(torch.full((channels,), value, dtype=torch.float64) for value in (1 / (sigma_data * own.scale), own.shift)))
    std, mean = torch.tensor(statistics.std, dtype=torch.float64) / sigma_data, torch.tensor(statistics.mean, dtype=torch.float64)
    if autoencoder.kind != TINY:
        return Affine(std, mean)  # the statistics are those of this autoencoder's latents
    # A small autoencoder expects the latents of the autoencoder that it imitates, as scaled by diffusers.
    original = SD_FACTORS if trained_on is None or trained_on.kind == TINY else trained_on.factors
    factor = original.scale / own.scale
    return Affine(std * factor, (mean - original.shift) * factor + own.shift)
