"""The family ``edm2``: the EDM2 U-Net with sCM's changes, in the TrigFlow parametrisation."""

from __future__ import annotations

import msgspec
import torch

from scm_export.checkpoints import Checkpoint, Loaded, SamplerSpec
from scm_export.errors import CheckpointError
from scm_export.families.autoencoders import SCM_STATISTICS, ImageNetworks, LatentStatistics, image_networks, pixel_networks
from scm_export.families.family import BuildOptions, Family
from scm_export.families.sampling import sampling_fields
from scm_export.families.weights import load_weights
from scm_export.model import Model
from scm_export.networks.autoguided import Autoguided
from scm_export.networks.edm2 import UNet, UNetConfig
from scm_export.parametrisation import Step
from scm_runtime.bundle.manifest import Conditioning
from scm_runtime.common.message_text import first_line, printable

AUTOGUIDANCE = 2.0  # default guidance scale, close to the best one at 512 x 512 (arXiv 2406.02507, table 1)


def recognizes_edm2(loaded: Loaded) -> bool:
    return isinstance(loaded, Checkpoint) and loaded.family == "edm2"


def build_edm2(loaded: Loaded, options: BuildOptions) -> Model:
    """Build the Model of a checkpoint whose config has the fields of :class:`~scm_export.networks.edm2.UNetConfig`.

    Raises:
        CheckpointError: config or weights do not fit the network.
    """
    if not isinstance(loaded, Checkpoint):
        raise CheckpointError(f"the family edm2 is read from scm-checkpoints and EDM2's pickles, got {loaded.describe()}")
    checkpoint, config, sampler = loaded, _config(loaded), loaded.sampler
    if config.segment_embedding and sampler.diffusion:
        raise CheckpointError("config of the family edm2: a network with segment_embedding is not a diffusion model, got sampler.diffusion = true")
    if config.segment_embedding and sampler.solver != "ddim":
        raise CheckpointError(f"config of the family edm2: with segment_embedding, sampler.solver must be 'ddim', got {sampler.solver!r}")

    if options.size is not None and options.latents:  # for images, the exporter checks the size
        raise CheckpointError(f"an EDM2 network has the resolution of its config, {config.img_resolution}: leave out the size")
    sample_shape = (config.img_channels, config.img_resolution, config.img_resolution)
    images = _images(sample_shape, sampler, options)  # before the weights are read: the decoder may be missing
    sampling = sampling_fields(sampler, segments=config.segment_embedding)
    own = _network(config, checkpoint)
    if options.guide is not None and (not sampling["samplers"] or config.guidance_embedding):
        raise CheckpointError("a guide is for a diffusion model without a guidance scale as input, which this checkpoint is not. Leave out the guide.")
    network = own if options.guide is None else Autoguided(own, _guide(options.guide, config, sampler))

    conditioning = []
    if config.label_dim:
        names = checkpoint.label_names
        if names is not None and len(names) != config.label_dim:
            raise CheckpointError(f"label_names must have one name a class, {config.label_dim}, got {len(names)}")
        conditioning.append(Conditioning(name="class_labels", kind="class", dtype="int64", num_classes=config.label_dim, label_names=names))
    if config.guidance_embedding or options.guide is not None:
        conditioning.append(Conditioning(name="guidance_scale", kind="scalar", dtype="float32", default=1.0 if options.guide is None else AUTOGUIDANCE))
    return Model(
        family="edm2",
        step=Step(network, sampler.sigma_data, sampler.parametrisation, sampler.solver, segments=config.segment_embedding),
        sample_shape=sample_shape,
        **sampling,
        conditioning=tuple(conditioning),
        decoder=images.decoder,
        encoder=images.encoder,
        preview=images.preview,
        licence=checkpoint.licence,
    )


def _config(checkpoint: Checkpoint) -> UNetConfig:
    unknown = sorted(set(checkpoint.config) - set(UNetConfig.__dataclass_fields__))
    try:
        if unknown:
            raise ValueError(f"unknown fields {', '.join(map(printable, unknown[:3]))}; known are {', '.join(UNetConfig.__dataclass_fields__)}")
        config: UNetConfig = msgspec.convert(checkpoint.config, UNetConfig, strict=False)
        config.validate()
    except ValueError as error:
        raise CheckpointError(f"config of the family edm2: {first_line(error)}") from error
    return config


def _network(config: UNetConfig, checkpoint: Checkpoint) -> UNet:
    try:
        with torch.device("meta"):
            network = UNet(config)
    except RuntimeError as error:  # values that are each in range can still give a tensor of more than 2^63 elements
        raise CheckpointError(f"config of the family edm2 describes a network too large for torch: {first_line(error)}") from error
    load_weights(network, checkpoint.weights)
    network.eval().fold()
    return network


def _guide(loaded: Loaded, own: UNetConfig, sampler: SamplerSpec) -> UNet:
    """Build the guide's network. Raises CheckpointError if its inputs or parametrisation differ from those of the guided network."""
    if not recognizes_edm2(loaded):
        raise CheckpointError(f"the guide must be of the family edm2 too, got {loaded.describe()}")
    assert isinstance(loaded, Checkpoint)
    config = _config(loaded)
    for name in ("img_resolution", "img_channels", "label_dim"):
        theirs, ours = getattr(config, name), getattr(own, name)
        if theirs != ours and (name != "label_dim" or theirs != 0):
            raise CheckpointError(f"the guide must have the {name} of the guided model, {ours}, got {theirs}")
    for name in ("parametrisation", "sigma_data"):
        theirs, ours = getattr(loaded.sampler, name), getattr(sampler, name)
        if theirs != ours:
            raise CheckpointError(f"the guide must have the {name} of the guided model, {ours!r}, got {theirs!r}")
    if config.guidance_embedding or config.segment_embedding:
        raise CheckpointError("the guide must be a diffusion model, without inputs for a guidance scale or for segments")
    return _network(config, loaded)


def _images(sample_shape: tuple[int, ...], sampler: SamplerSpec, options: BuildOptions) -> ImageNetworks:
    """Create the image networks. The state is latents if the checkpoint has latent statistics or the user gives a decoder; otherwise it is pixels."""
    pixels, mean, std = (sampler.pixel_scale, sampler.pixel_offset), sampler.latent_mean, sampler.latent_std
    if mean is None and std is None and options.decoder is None:
        return pixel_networks(options, sample_shape, pixels)
    if (mean is None) != (std is None):
        raise CheckpointError("sampler.latent_mean and sampler.latent_std must be given together, got one of them")
    statistics = SCM_STATISTICS if mean is None or std is None else LatentStatistics(mean, std)
    return image_networks(options, sample_shape, sampler.sigma_data, statistics=statistics, pixels=pixels)


FAMILY = Family(
    looks_for="a scm-checkpoint whose family is edm2, or a pickle of NVIDIA's EDM2 or of edm2_sCM",
    recognizes=recognizes_edm2,
    build=build_edm2,
)
