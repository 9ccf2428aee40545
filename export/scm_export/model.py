"""``Model``: a checkpoint ready for export, in the same form for every family."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from scm_export.choices import QUANTIZED_BITS, TextDtype
from scm_export.ops import to_image
from scm_runtime.bundle.manifest import Conditioning, Dtype, OutputSpec
from scm_runtime.bundle.solver_tables import SolverStages
from scm_runtime.bundle.text_spec import TextSpec

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ImageDecoder:
    """Pixels computed from the state without a network: uint8 level = x * scale + offset."""

    scale: float
    offset: float


@dataclass(frozen=True)
class ImageNetwork:
    """A network between latents and images.

    A decoder maps x, float32 ``[N, *sample]``, to uint8 ``[N, H, W, C]`` and ends with ``ops.to_image``; an encoder does the reverse. Modules with an
    attribute ``compute_dtype`` compute in that dtype.
    """

    network: nn.Module
    shape: tuple[int, int, int]
    """Shape of the image, ``(H, W, C)``."""


@dataclass(frozen=True)
class Latents:
    """No decoder: the bundle's samples are the final state."""


Decoder = ImageDecoder | ImageNetwork | Latents


@dataclass(frozen=True)
class Reference:
    """The sampler that the checkpoint's authors published, with this project's noise instead of its own."""

    name: str
    """Name for the report, such as ``SCMScheduler of diffusers 0.42``."""
    sample: Callable[[Sequence[Tensor], tuple[float, ...], dict[str, Tensor]], Tensor]
    """Maps draws 0, 1, … of standard normal noise, float32 ``[N, *sample]``, the times with the end time last, and the conditioning to the final state."""


TextReference = Callable[[Sequence[str]], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
"""Maps prompts to (token ids of each tokenizer, int64 ``[N, max_length]``; outputs of the encoder, each ``[N, ...]``), by the authors' code."""


@dataclass
class TextEncoder:
    """The networks that turn the token ids of a prompt into conditioning, and their tokenizers."""

    network: nn.Module
    """Maps, for each tokenizer, ``input_ids`` and, if it has one, ``attention_mask``, all int64 ``[N, max_length]``, to a tuple of outputs in the order of
    ``spec.outputs``. Modules inside with an attribute ``compute_dtype`` compute in that dtype. No gradients."""
    spec: TextSpec
    """As in the manifest, except that the exporter sets ``weights_dtype``."""
    tokenizers: dict[str, bytes]
    """Contents of each tokenizer's file, by name."""
    reference: TextReference | None
    """transformers' classes, with the same weights; None once the weights are rounded."""

    def store_as(self, dtype: TextDtype, others: Dtype) -> None:
        """Round the parameters to the dtype they are stored in, in place. The reference cannot be used afterwards.

        With "int8" and "int4", the weights of linear layers stay float32, to be quantized in the graph, and all others are rounded to the dtype ``others``.
        """
        self.reference = None
        for parameter, stored in self.stored_as(dtype, others):
            if stored not in QUANTIZED_BITS:
                parameter.data = parameter.data.to(DTYPES[stored])

    def stored_as(self, dtype: TextDtype, others: Dtype) -> Iterator[tuple[nn.Parameter, TextDtype]]:
        """The parameters, each with the dtype that it is stored in: see :meth:`store_as`."""
        for module in self.network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                quantized = isinstance(module, nn.Linear) and name == "weight"
                yield parameter, dtype if quantized or dtype not in QUANTIZED_BITS else others

    @property
    def inputs(self) -> dict[str, int]:
        """Inputs of the text graph, int64 ``[N, length]``: the length by name."""
        return {name: one.max_length for one in self.spec.tokenizers for name in one.inputs}


@dataclass
class Model:
    """A sampler in PyTorch, from which a bundle is made."""

    family: str
    step: nn.Module
    """One step, ``(x, t, t_next, noise, conditioning) -> x_next``: see :class:`~scm_export.parametrisation.Step`. Inputs and output are float32. Modules
    inside with an attribute ``compute_dtype`` compute in that dtype. No gradients."""
    sample_shape: tuple[int, ...]
    """Shape of the state, ``[C, H, W]``."""
    sigma_data: float
    initial_scale: float
    """Factor of the standard normal noise in the first state."""
    times: dict[int, tuple[float, ...]]
    """Times by step count, the end time last."""
    decoder: Decoder
    conditioning: tuple[Conditioning, ...] = ()
    licence: str | None = None
    time_unit: Literal["radians", "sigma", "timestep"] = "radians"
    solver: Literal["consistency", "ddim"] = "consistency"
    """"consistency": the step jumps to the data and adds noise again; "ddim": it follows the ODE."""
    samplers: dict[str, dict[int, SolverStages]] = field(default_factory=dict)
    """Additional samplers of a diffusion model, by name and number of steps."""
    encoder: ImageNetwork | None = None
    """Maps an image to the mean of x, for image editing."""
    preview: ImageNetwork | None = None
    """Small decoder for previews of states between steps."""
    text: TextEncoder | None = None
    """Encoder of prompts; None if the bundle takes embeddings only."""
    notes: tuple[str, ...] = ()
    """What the user should know about assumptions of the export."""
    fp32_networks: list[nn.Module] = field(default_factory=list)
    """Networks between latents and images that compute in float32 in the graphs in fp16, too, because their activations overflow float16."""
    reference: Reference | None = None
    """Sampler that the bundle is verified against; None for the step in eager PyTorch."""

    @property
    def networks(self) -> Iterator[nn.Module]:
        """All networks that graphs are traced from, except the text encoder, whose weights may have another dtype."""
        yield self.step
        yield from (part.network for part in (self.decoder, self.encoder, self.preview) if isinstance(part, ImageNetwork))

    @property
    def parameters(self) -> int:
        """Number of parameters of the step."""
        return sum(p.numel() for p in self.step.parameters())

    @property
    def output(self) -> OutputSpec:
        """Kind and shape of a sample."""
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
        """Decode x in eager PyTorch. Returns pixels, uint8 ``[N, H, W, C]``, or x if samples are latents."""
        match self.decoder:
            case ImageDecoder(scale=scale, offset=offset):
                return to_image(x, scale, offset)
            case ImageNetwork(network=network):
                pixels: Tensor = network(x)
                return pixels
            case Latents():
                return x

    def store_as(self, dtype: str) -> None:
        """Round the parameters to the dtype they are stored in, in place and one tensor at a time. Buffers, such as frequencies, stay float32."""
        for network in self.networks:
            for parameter in network.parameters():
                parameter.data = parameter.data.to(DTYPES[dtype])

    def release(self) -> None:
        """Release the memory of the weights. The model cannot be used afterwards."""
        self.reference = None
        text = () if self.text is None else (self.text.network,)
        if self.text is not None:
            self.text.reference = None
        for network in (*self.networks, *text):
            for module in network.modules():  # any remaining buffer would keep a mapped file open
                for tensor in module.parameters(recurse=False):
                    tensor.data = tensor.data.new_empty(0)
                module._buffers.update(dict.fromkeys(module._buffers))  # set to None, not resized: other objects may use the tensor
        gc.collect()  # tracing leaves reference cycles

    def compute_in(self, dtype: str) -> None:
        """Set the compute dtype of all networks; for fp16, those in ``fp32_networks`` stay in fp32. Raises ValueError if another only computes in fp32."""
        for network in self.networks:
            kept = dtype == "fp16" and any(network is other for other in self.fp32_networks)
            compute_in(network, "fp32" if kept else dtype)


def compute_in(network: nn.Module, dtype: str) -> None:
    """Set the compute dtype of a network. Raises ValueError if it only computes in fp32."""
    switchable = [module for module in network.modules() if hasattr(module, "compute_dtype")]
    if not switchable and dtype != "fp32" and any(True for _ in network.parameters()):
        raise ValueError(f"a {type(network).__name__} computes in fp32 only, asked for {dtype}")
    for module in switchable:
        setattr(module, "compute_dtype", DTYPES[dtype])  # noqa: B010 - nn.Module declares no such attribute
