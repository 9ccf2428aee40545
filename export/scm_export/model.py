"""``Model``: a family's checkpoint made ready for export. What differs between families ends here."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from scm_export.ops import to_image
from scm_runtime.bundle.manifest import Conditioning, OutputSpec
from scm_runtime.bundle.solver_tables import SolverStages

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ImageDecoder:
    """Pixels straight from the state: uint8 level = x * scale + offset."""

    scale: float
    offset: float


@dataclass(frozen=True)
class ImageNetwork:
    """A network between latents and images: a decoder takes x, float32 ``[N, *sample]``, and gives uint8 ``[N, H, W, C]`` by ``ops.to_image``; an encoder
    does the reverse. Its modules that have a ``compute_dtype`` follow it."""

    network: nn.Module
    shape: tuple[int, int, int]
    """Of the image, ``(H, W, C)``."""


@dataclass(frozen=True)
class Latents:
    """No decoder: the bundle's samples are the final state."""


Decoder = ImageDecoder | ImageNetwork | Latents


@dataclass(frozen=True)
class Reference:
    """The sampler that the checkpoint's authors published, with this project's noise in the place of theirs."""

    name: str
    """What it is, for the report: ``SCMScheduler of diffusers 0.42``."""
    sample: Callable[[Sequence[Tensor], tuple[float, ...], dict[str, Tensor]], Tensor]
    """(draws 0, 1, … of standard normal noise, float32 ``[N, *sample]``; times, the end last; conditioning) to the final state."""


@dataclass
class Model:
    """A sampler in PyTorch: what a bundle is made from, and what it is verified against."""

    family: str
    step: nn.Module
    """One step, ``(x, t, t_next, noise, conditioning) -> x_next``: see :class:`~scm_export.parametrisation.Step`. Float32 at its borders, without
    gradients; the modules inside that have a ``compute_dtype`` follow it."""
    sample_shape: tuple[int, ...]
    """Of the state, ``[C, H, W]``."""
    sigma_data: float
    initial_scale: float
    """The state starts as this times standard normal noise."""
    times: dict[int, tuple[float, ...]]
    """For each step count its times, the end time last."""
    decoder: Decoder
    conditioning: tuple[Conditioning, ...] = ()
    licence: str | None = None
    time_unit: Literal["radians", "sigma", "timestep"] = "radians"
    solver: Literal["consistency", "ddim"] = "consistency"
    """What the step does: jump to the data and noise again, or follow the ODE."""
    samplers: dict[str, dict[int, SolverStages]] = field(default_factory=dict)
    """Of a diffusion model: other samplers, by name and number of steps."""
    encoder: ImageNetwork | None = None
    """For editing: image to x, by the posterior's mean."""
    preview: ImageNetwork | None = None
    """A small decoder, for looking at states between steps."""
    reference: Reference | None = None
    """None: the step itself in eager PyTorch."""

    @property
    def networks(self) -> Iterator[nn.Module]:
        """Every network that a graph is traced from."""
        yield self.step
        yield from (part.network for part in (self.decoder, self.encoder, self.preview) if isinstance(part, ImageNetwork))

    @property
    def parameters(self) -> int:
        """Number of learned parameters of the step."""
        return sum(p.numel() for p in self.step.parameters())

    @property
    def output(self) -> OutputSpec:
        """What a sample is."""
        match self.decoder:
            case ImageDecoder():
                channels, height, width = self.sample_shape
                return OutputSpec(kind="image", shape=(height, width, channels))
            case ImageNetwork(shape=shape):
                return OutputSpec(kind="image", shape=shape)
            case Latents():
                return OutputSpec(kind="latent", shape=self.sample_shape)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """The decoder in eager PyTorch: pixels, uint8 ``[N, H, W, C]``, or the latents as they are."""
        match self.decoder:
            case ImageDecoder(scale=scale, offset=offset):
                return to_image(x, scale, offset)
            case ImageNetwork(network=network):
                pixels: Tensor = network(x)
                return pixels
            case Latents():
                return x

    def store_as(self, dtype: str) -> None:
        """Round the weights to the dtype they will be stored in, in place, one tensor at a time. Buffers (frequencies) stay in float32."""
        for network in self.networks:
            for parameter in network.parameters():
                parameter.data = parameter.data.to(DTYPES[dtype])

    def release(self) -> None:
        """Give the memory of the weights back. The model cannot be used again."""
        self.reference = None
        for network in self.networks:
            for module in network.modules():  # one buffer is enough to keep a mapped file
                for tensor in module.parameters(recurse=False):
                    tensor.data = tensor.data.new_empty(0)
                module._buffers.update(dict.fromkeys(module._buffers))  # a table may be held by others too
        gc.collect()  # tracing leaves cycles behind

    def compute_in(self, dtype: str) -> None:
        """Set the dtype of the feature maps."""
        for network in self.networks:
            dated = [module for module in network.modules() if hasattr(module, "compute_dtype")]
            if not dated and dtype != "fp32" and any(True for _ in network.parameters()):
                raise ValueError(f"a {type(network).__name__} computes in fp32 only, asked for {dtype}")
            for module in dated:
                setattr(module, "compute_dtype", DTYPES[dtype])  # noqa: B010 - nn.Module declares no such attribute
