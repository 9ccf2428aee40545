"""Between latents and images: diffusers' autoencoders as a model's decoder, encoder and preview decoder.

What a family calls is :func:`image_networks`. An autoencoder comes from ``--decoder FOLDER``, or from the checkpoint's own pipeline folder.
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
from scm_export.families.diffusers_networks import free_batch, make_network, read_weights
from scm_export.families.family import BuildOptions
from scm_export.families.weights import load_weights
from scm_export.model import Decoder, ImageDecoder, ImageNetwork, Latents
from scm_export.ops import to_image
from scm_export.precision import Precision

TINY = "AutoencoderTiny"

# The children that decode and those that encode, in the order they are applied in. The convolutions round the latents are not in every one.
AUTOENCODERS: dict[str, dict[str, tuple[str, ...]]] = {
    "AutoencoderKL": {"decode": ("post_quant_conv", "decoder"), "encode": ("encoder", "quant_conv")},
    "AutoencoderDC": {"decode": ("decoder",), "encode": ("encoder",)},
    TINY: {"decode": ("decoder",), "encode": ("encoder",)},
}


class Factors(NamedTuple):
    """How diffusers scales an autoencoder's latents: ``scaled = (latent - shift) * scale``."""

    scale: float
    shift: float


SD_FACTORS = Factors(0.18215, 0.0)  # of Stable Diffusion's autoencoder
PIXELS = (127.5, 127.5)  # pixels in [-1, 1]


@dataclass(frozen=True)
class LatentStatistics:
    """Of an autoencoder's latents, by channel, for models trained on latents of zero mean: ``latent = x * std / sigma_data + mean``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


SCM_STATISTICS = LatentStatistics((1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31))
"""sCM's, of sd-vae-ft-mse on images in [-1, 1] (arXiv 2410.11081, appendix on ImageNet 512x512)."""


class ImageNetworks(NamedTuple):
    """A model's ways between its state and images."""

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
    """Decoder, and as the options ask encoder and preview decoder, of a model of latents.

    Args:
        options: ``decoder``, ``latents``, ``with_encoder`` and ``preview_decoder`` are read.
        sample_shape: of the state, ``[C, H, W]``.
        sigma_data: the state is this times latents of about unit variance.
        folder: the checkpoint's own; its autoencoder is taken where the options give none.
        statistics: how the latents were made to have unit variance; None for diffusers' way, ``(latent - shift_factor) * scaling_factor`` with the
            autoencoder's own factors.
        pixels: scale and offset from the autoencoder's pixels to levels; the default is for pixels in [-1, 1].

    Raises:
        CheckpointError: there is no decoder, or one does not fit the state.
    """
    own = folder if folder is not None and folder.find(*AUTOENCODERS) is not None else None
    source = own if options.decoder is None else _open(options.decoder, "--decoder")
    if source is None and (options.with_encoder or not options.latents):
        what, instead = ("encoder", "") if options.latents else ("decoder", ", or export a sampler of latents with --latents")
        raise CheckpointError(
            f"missing {what}: this is a model of latents, {list(sample_shape)}, and its checkpoint has no autoencoder. "
            f"Give the autoencoder's folder, as diffusers saves it, with --decoder FOLDER{instead}."
        )
    if statistics is not None and not len(statistics.mean) == len(statistics.std) == sample_shape[0]:
        raise CheckpointError(f"latent_mean and latent_std must have one value a channel, {sample_shape[0]}, got {statistics.mean} and {statistics.std}")
    trained_on = None if source is None else _Autoencoder(source)
    decoder: Decoder = Latents()
    encoder = preview = None
    if trained_on is not None:
        latents, image_shape = _latents(trained_on, trained_on, sigma_data, statistics, sample_shape[0]), trained_on.image_shape(sample_shape)
        if not options.latents:
            decoder = ImageNetwork(LatentsToImage(trained_on.part("decode"), latents, pixels), image_shape)
        if options.with_encoder:
            encoder = ImageNetwork(ImageToLatents(trained_on.part("encode"), latents, pixels), image_shape)
    if options.preview_decoder is not None:
        small = _Autoencoder(_open(options.preview_decoder, "--preview-decoder"))
        latents, image_shape = _latents(small, trained_on, sigma_data, statistics, sample_shape[0]), small.image_shape(sample_shape)
        preview = ImageNetwork(LatentsToImage(small.part("decode"), latents, pixels), image_shape)
    return ImageNetworks(decoder, encoder, preview)


def pixel_networks(options: BuildOptions, sample_shape: tuple[int, ...], pixels: tuple[float, float] = PIXELS) -> ImageNetworks:
    """The same for a model whose state is an image, ``level = x * scale + offset`` with ``pixels = (scale, offset)``.

    Raises:
        CheckpointError: the options name an autoencoder.
    """
    for option, given in (("--decoder", options.decoder), ("--preview-decoder", options.preview_decoder)):
        if given is not None:
            raise CheckpointError(f"{option} is for models of latents; this one samples pixels, {list(sample_shape)}: leave it out")
    channels, height, width = sample_shape
    encoder = ImageNetwork(ImageToPixels(pixels), (height, width, channels)) if options.with_encoder else None
    return ImageNetworks(Latents() if options.latents else ImageDecoder(*pixels), encoder, None)


def downsampling(options: BuildOptions, folder: DiffusersFolder, default: int) -> int:
    """Pixels a latent, along each side; the default where there is no autoencoder yet.

    Raises:
        CheckpointError: ``--decoder`` is no autoencoder.
    """
    source = folder if options.decoder is None else _open(options.decoder, "--decoder")
    return default if source.find(*AUTOENCODERS) is None else _Autoencoder(source).downsampling


class Affine(NamedTuple):
    """From a state to an autoencoder's latents, by channel: ``latent = x * scale + shift``; float64 ``[C]``."""

    scale: Tensor
    shift: Tensor


class LatentsToImage(nn.Module):
    """x, float32 ``[N, C, H, W]``, to an image, uint8 ``[N, H', W', C']``."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, latents: Affine, pixels: tuple[float, float]) -> None:
        super().__init__()
        self.network, self.pixels = Precision(network), pixels
        self.register_buffer("scale", latents.scale.float().reshape(-1, 1, 1))
        self.register_buffer("shift", latents.shift.float().reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return to_image(self.network(x * self.scale + self.shift), *self.pixels)


class ImageToLatents(nn.Module):
    """An image, uint8 ``[N, H', W', C']``, to x, float32 ``[N, C, H, W]``: the mean, where the autoencoder gives a distribution."""

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
    """An image, uint8 ``[N, H, W, C]``, to x, float32 ``[N, C, H, W]``, where x are pixels."""

    def __init__(self, pixels: tuple[float, float]) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, image: Tensor) -> Tensor:
        scale, offset = self.pixels
        return (image.permute(0, 3, 1, 2).float() - offset) / scale


def _open(path: Path, option: str) -> DiffusersFolder:
    if not is_diffusers_folder(path):
        raise CheckpointError(f"{option} must be the folder of an autoencoder as diffusers saves it, with config.json and weights; got '{path}'")
    folder = DiffusersFolder(path)
    if folder.find(*AUTOENCODERS) is None:
        raise CheckpointError(f"{option} must hold one of {', '.join(AUTOENCODERS)}, got {folder.describe()}")
    return folder


class _Autoencoder:
    """An autoencoder in a folder, its weights still there."""

    def __init__(self, folder: DiffusersFolder) -> None:
        component = folder.find(*AUTOENCODERS)
        assert component is not None
        self.folder, self.component, self.kind = folder, component, folder.classes[component]
        self.network = make_network(folder, component)
        free_batch(self.network)
        config: Any = self.network.config
        self.latent_channels = int(config.latent_channels)
        self.factors = Factors(float(config.scaling_factor), float(config.get("shift_factor") or 0.0))

    @property
    def downsampling(self) -> int:
        """Pixels a latent, along each side."""
        return self.image_shape((self.latent_channels, 8, 8))[0] // 8

    def part(self, way: Literal["encode", "decode"]) -> nn.Module:
        """One half with its weights, on the CPU."""
        part = _Half(self.network, AUTOENCODERS[self.kind][way])
        try:
            load_weights(part, read_weights(self.folder, self.component, *part.names))
        except CheckpointError as error:
            raise CheckpointError(f"the {self.kind} in '{self.folder.path}': {error}") from error
        return part

    def image_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Of an image with latents of this shape, ``(H, W, C)``; found by running both halves without weights. Raises CheckpointError: none has."""
        try:
            image = _Half(self.network, AUTOENCODERS[self.kind]["decode"])(torch.empty(1, *sample_shape, device="meta"))
            latents = _Half(self.network, AUTOENCODERS[self.kind]["encode"])(image)[0, : sample_shape[0]]
            if latents.shape != sample_shape:
                raise ValueError(f"an image of {list(image.shape[1:])} has latents of {list(latents.shape)}")
        except (RuntimeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"the {self.kind} in '{self.folder.path}' does not fit the model's latents, {list(sample_shape)}: {reason}") from error
        channels, height, width = image.shape[1:]
        return height, width, channels


class _Half(nn.Module):
    """Children of an autoencoder, under their names there, one applied after the other."""

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


def _latents(autoencoder: _Autoencoder, trained_on: _Autoencoder | None, sigma_data: float, statistics: LatentStatistics | None, channels: int) -> Affine:
    """The latents of an autoencoder for a model that was trained on those of this or another one."""
    own = autoencoder.factors
    if statistics is None:
        return Affine(*(torch.full((channels,), value, dtype=torch.float64) for value in (1 / (sigma_data * own.scale), own.shift)))
    std, mean = torch.tensor(statistics.std, dtype=torch.float64) / sigma_data, torch.tensor(statistics.mean, dtype=torch.float64)
    if autoencoder.kind != TINY:
        return Affine(std, mean)  # the statistics are of these very latents
    # A small autoencoder takes latents as diffusers scales them, of the autoencoder that it imitates.
    original = SD_FACTORS if trained_on is None or trained_on.kind == TINY else trained_on.factors
    factor = original.scale / own.scale
    return Affine(std * factor, (mean - original.shift) * factor + own.shift)
