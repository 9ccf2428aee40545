"""The family ``edm2``: the EDM2 U-Net with sCM's changes, in TrigFlow's parametrisation."""

from __future__ import annotations

import msgspec
import torch

from scm_export.checkpoints import Checkpoint, Loaded, SamplerSpec
from scm_export.families.autoencoders import SCM_STATISTICS, ImageNetworks, LatentStatistics, image_networks, pixel_networks
from scm_export.families.family import BuildOptions, Family
from scm_export.families.weights import load_weights
from scm_export.model import Model
from scm_export.networks.edm2 import UNet, UNetConfig
from scm_export.parametrisation import Step, default_times
from scm_runtime.bundle import Conditioning
from scm_runtime.errors import CheckpointError


def recognises_edm2(loaded: Loaded) -> bool:
    return isinstance(loaded, Checkpoint) and loaded.family == "edm2"


def build_edm2(loaded: Loaded, options: BuildOptions) -> Model:
    """A Model from a checkpoint whose config has the fields of :class:`~scm_export.networks.edm2.UNetConfig`.

    Raises:
        CheckpointError: config or weights do not fit the network.
    """
    if not isinstance(loaded, Checkpoint):
        raise CheckpointError(f"the family edm2 is read from scm-checkpoints and EDM2's pickles, got {loaded.describe()}")
    checkpoint = loaded
    unknown = sorted(set(checkpoint.config) - set(UNetConfig.__dataclass_fields__))
    try:
        if unknown:
            raise ValueError(f"unknown fields {', '.join(unknown)}; known are {', '.join(UNetConfig.__dataclass_fields__)}")
        config = msgspec.convert(checkpoint.config, UNetConfig, strict=False)
        config.validate()
    except ValueError as error:
        raise CheckpointError(f"config of the family edm2: {error}") from error
    sampler = checkpoint.sampler
    if config.segment_embedding and sampler.solver != "ddim":
        raise CheckpointError(f"config of the family edm2: with segment_embedding, sampler.solver must be 'ddim', got {sampler.solver!r}")

    if options.size is not None and options.latents:  # of images the exporter compares it with what the model makes
        raise CheckpointError(f"an EDM2 network has the resolution of its config, {config.img_resolution}: leave out the size")
    sample_shape = (config.img_channels, config.img_resolution, config.img_resolution)
    images = _images(sample_shape, sampler, options)  # before the weights are read: the decoder may be missing
    with torch.device("meta"):
        network = UNet(config)
    load_weights(network, checkpoint.weights)
    network.eval().fold()

    conditioning = []
    if config.label_dim:
        names = checkpoint.label_names
        if names is not None and len(names) != config.label_dim:
            raise CheckpointError(f"label_names must have one name a class, {config.label_dim}, got {len(names)}")
        conditioning.append(Conditioning(name="class_labels", kind="class", dtype="int64", num_classes=config.label_dim, label_names=names))
    if config.guidance_embedding:
        conditioning.append(Conditioning(name="guidance_scale", kind="scalar", dtype="float32", default=1.0))
    times = default_times(sampler.sigma_data)
    if sampler.times is not None:
        times = {int(count): values for count, values in sampler.times.items()}
    return Model(
        family="edm2",
        step=Step(network, sampler.sigma_data, sampler.parametrisation, sampler.solver, segments=config.segment_embedding),
        sample_shape=sample_shape,
        sigma_data=sampler.sigma_data,
        initial_scale=sampler.sigma_data if sampler.initial_scale is None else sampler.initial_scale,
        times=times,
        conditioning=tuple(conditioning),
        decoder=images.decoder,
        encoder=images.encoder,
        preview=images.preview,
        licence=checkpoint.licence,
    )


def _images(sample_shape: tuple[int, ...], sampler: SamplerSpec, options: BuildOptions) -> ImageNetworks:
    """Latents are what a checkpoint says to be so, by their statistics, or what a user gives a decoder for; anything else is pixels, RGBA too."""
    pixels, mean, std = (sampler.pixel_scale, sampler.pixel_offset), sampler.latent_mean, sampler.latent_std
    if mean is None and std is None and options.decoder is None:
        return pixel_networks(options, sample_shape, pixels)
    if (mean is None) != (std is None):
        raise CheckpointError("sampler.latent_mean and sampler.latent_std go together, got one of them")
    statistics = SCM_STATISTICS if mean is None or std is None else LatentStatistics(mean, std)
    return image_networks(options, sample_shape, sampler.sigma_data, statistics=statistics, pixels=pixels)


FAMILY = Family(
    looks_for="a scm-checkpoint whose family is edm2, or a pickle of NVIDIA's EDM2 or of edm2_sCM",
    recognises=recognises_edm2,
    build=build_edm2,
)
