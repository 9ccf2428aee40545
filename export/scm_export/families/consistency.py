"""The family ``consistency``: OpenAI's consistency models (arXiv 2303.01469), from a folder of diffusers' ConsistencyModelPipeline.

The state is data plus noise of standard deviation sigma, as in EDM, and times are sigmas. Sampling ends at sigma_min, where the network is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scm_export.checkpoints import DiffusersFolder, Loaded
from scm_export.errors import CheckpointError
from scm_export.families.autoencoders import pixel_networks
from scm_export.families.diffusers_networks import (
    check_size,
    find_component,
    injected_noise,
    keep_time_features_fp32,
    make_batch_dynamic,
    make_network,
    make_scheduler,
    read_weights,
    sample_size,
    share_weights,
    unet_keeps_fp32,
)
from scm_export.families.family import BuildOptions, Family
from scm_export.families.weights import load_weights
from scm_export.lora import merge_loras
from scm_export.model import Model, Reference
from scm_export.precision import Precision
from scm_runtime.bundle.manifest import Conditioning
from scm_runtime.common.message_text import printable

PIPELINE, UNET, SCHEDULER = "ConsistencyModelPipeline", "UNet2DModel", "CMStochasticIterativeScheduler"

# Index of the noise level at which the second of two steps starts, by number of noise levels in training and image size. Found by the authors' search
# (scripts/launch.sh of openai/consistency_models) for ImageNet 64 and LSUN bedroom 256; 40 levels are distilled models, the others trained in isolation.
SECOND_LEVEL = {(40, 64): 22, (40, 256): 17, (201, 64): 106, (151, 256): 67}


class ConsistencyStep(nn.Module):
    """One step from sigma = t to sigma_next = t_next: Algorithm 1 of arXiv 2303.01469, with the scalings of its appendix C.

    ``D = c_skip x + c_out F(c_in x, 250 ln sigma)``, ``x_next = D + sqrt(sigma_next^2 - sigma_min^2) noise``.
    """

    def __init__(self, unet: nn.Module, config: Any) -> None:
        """Create the step from a U-Net and the configuration of its scheduler."""
        super().__init__()
        self.network = Precision(unet, unet_keeps_fp32)
        self.sigma_data, self.s_noise, self.clip = float(config.sigma_data), float(config.s_noise), bool(config.clip_denoised)
        self.sigma_min, self.sigma_max = _single(config.sigma_min), _single(config.sigma_max)

    def forward(self, x: Tensor, t: Tensor, t_next: Tensor, noise: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        # In float64: near the ends, small differences of squares matter, and 250 ln sigma has few accurate digits in float32.
        sigma, sigma_next = t.double(), t_next.double().clamp(self.sigma_min, self.sigma_max)
        variance = sigma**2 + self.sigma_data**2
        c_in, c_out = 1 / variance.sqrt(), (sigma - self.sigma_min) * self.sigma_data / variance.sqrt()
        c_skip = self.sigma_data**2 / ((sigma - self.sigma_min) ** 2 + self.sigma_data**2)
        F: Tensor = self.network(x * _per_sample(c_in), (250 * torch.log(sigma)).float(), return_dict=False, **conditioning)[0]
        D = _per_sample(c_skip) * x + _per_sample(c_out) * F
        if self.clip:
            D = D.clamp(-1, 1)
        # Not a difference of squares: graph constants are float32, and a rounded square would give a value below 0 at the end.
        fresh = ((sigma_next - self.sigma_min) * (sigma_next + self.sigma_min)).clamp(min=0).sqrt()
        return D + _per_sample(self.s_noise * fresh) * noise


def recognizes_consistency(loaded: Loaded) -> bool:
    if not isinstance(loaded, DiffusersFolder):
        return False
    return loaded.pipeline == PIPELINE or (loaded.find(SCHEDULER) is not None and loaded.find(UNET) is not None)


def build_consistency(loaded: Loaded, options: BuildOptions) -> Model:
    """Build the Model of a folder of ConsistencyModelPipeline.

    Raises:
        CheckpointError: the folder holds another model, lacks a component, or its weights do not fit its configuration.
        InvalidArgumentError: the network cannot generate images of the requested size.
    """
    folder, component = find_component(loaded, "consistency", UNET)
    scheduler = make_scheduler(folder, SCHEDULER)
    unet, original = make_network(folder, component), make_network(folder, component)
    config: Any = unet.config
    _check(config, scheduler.config, folder)
    sample_shape = (config.in_channels, *sample_size(config, options.size))
    labelled = {} if config.num_class_embeds is None else {"class_labels": torch.zeros(1, dtype=torch.int64, device="meta")}
    make_batch_dynamic(unet)
    check_size(unet, sample_shape, **labelled)
    keep_time_features_fp32(unet)
    load_weights(unet, read_weights(folder, component))
    merge_loras(options.loras, unet)
    share_weights(original, unet)
    step = ConsistencyStep(unet, scheduler.config)
    images = pixel_networks(options, sample_shape)
    return Model(
        family="consistency",
        step=step,
        sample_shape=sample_shape,
        licence=folder.licence,
        sigma_data=step.sigma_data,
        initial_scale=float(scheduler.init_noise_sigma),
        times=_times(scheduler, max(sample_shape[1:])),
        time_unit="sigma",
        conditioning=tuple(Conditioning(name=name, kind="class", dtype="int64", num_classes=config.num_class_embeds) for name in labelled),
        decoder=images.decoder,
        encoder=images.encoder,
        preview=images.preview,
        reference=cm_scheduler(original, scheduler),
    )


def _check(unet: Any, scheduler: Any, folder: DiffusersFolder) -> None:
    """Check for configurations that ConsistencyModelPipeline does not support. Raises CheckpointError."""
    expected = {"class_embed_type": None, "time_embedding_type": "positional", "out_channels": unet.in_channels}
    for name, value in expected.items():
        if unet[name] != value:
            raise CheckpointError(f"{name} of the {UNET} in {folder.describe()} must be {value!r} in a consistency model, got {unet[name]!r}")
    if not 0 < scheduler.sigma_min < scheduler.sigma_max < math.inf:
        raise CheckpointError(
            f"the {SCHEDULER} of {folder.describe()} must have 0 < sigma_min < sigma_max, got {scheduler.sigma_min} and {scheduler.sigma_max}"
        )
    for name in ("sigma_data", "rho"):
        if not 0 < scheduler[name] < math.inf:
            raise CheckpointError(f"{name} of the {SCHEDULER} in {folder.describe()} must be a number above 0, got {printable(scheduler[name])}")


def _times(scheduler: Any, size: int) -> dict[int, tuple[float, ...]]:
    """Sigmas for one and two steps, computed by the scheduler."""
    levels = scheduler.config.num_train_timesteps
    times = {}
    for indices in ([0], [SECOND_LEVEL.get((levels, size), round(levels * 22 / 40)), 0]):
        scheduler.set_timesteps(timesteps=indices)
        times[len(indices)] = tuple(scheduler.sigmas.tolist())
    return times


def cm_scheduler(unet: nn.Module, scheduler: Any) -> Reference:
    """Reference sampler: diffusers' scheduler and U-Net, in the loop of ConsistencyModelPipeline."""
    import diffusers
    from diffusers.schedulers import scheduling_consistency_models

    @torch.no_grad()
    def sample(noises: Sequence[Tensor], times: tuple[float, ...], conditioning: dict[str, Tensor]) -> Tensor:
        steps = len(times) - 1
        scheduler.set_timesteps(steps)
        scheduler.sigmas = torch.tensor(times)  # by itself the scheduler only offers the levels of its training
        scheduler.timesteps = torch.from_numpy(scheduler.sigma_to_t(scheduler.sigmas[:-1].double().numpy()))
        x: Tensor = noises[0] * scheduler.init_noise_sigma
        with injected_noise(scheduling_consistency_models, noises[1:]):
            for t in scheduler.timesteps:
                F = unet(scheduler.scale_model_input(x, t), t, return_dict=False, **conditioning)[0]
                x = scheduler.step(F, t, x, return_dict=False)[0]
        return x

    return Reference(f"{SCHEDULER} of diffusers {diffusers.__version__}", sample)


def _single(value: float) -> float:
    """Round to float32, the dtype of times, so that the last time equals sigma_min exactly."""
    return float(torch.tensor(value, dtype=torch.float32))


def _per_sample(values: Tensor) -> Tensor:
    return values.float().reshape(-1, 1, 1, 1)


FAMILY = Family(
    looks_for=f"a diffusers folder of {PIPELINE}: a {UNET} with a {SCHEDULER}",
    recognizes=recognizes_consistency,
    build=build_consistency,
    takes_lora=True,
)
