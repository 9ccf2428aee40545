"""``Model``: a family's checkpoint made ready for export. What differs between families ends here."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from torch import nn

from scm_runtime.bundle import Conditioning

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class ImageDecoder:
    """Pixels straight from the state: uint8 level = x * scale + offset."""

    scale: float
    offset: float


@dataclass
class Model:
    """A sampler in PyTorch: what a bundle is made from, and what it is verified against."""

    family: str
    network: nn.Module
    """F(x / sigma_d, t, **conditioning), float32 at its borders, without gradients. Its ``compute_dtype``, if it has one, sets the dtype inside."""
    sample_shape: tuple[int, ...]
    """Of the state, ``[C, H, W]``."""
    sigma_data: float
    initial_scale: float
    """The state starts as this times standard normal noise."""
    times: dict[int, tuple[float, ...]]
    """For each step count its times, the end time last."""
    decoder: ImageDecoder
    conditioning: tuple[Conditioning, ...] = ()
    licence: str | None = None

    @property
    def parameters(self) -> int:
        """Number of learned parameters."""
        return sum(p.numel() for p in self.network.parameters())

    def store_as(self, dtype: str) -> None:
        """Round the weights to the dtype they will be stored in, in place, one tensor at a time. Buffers (frequencies) stay in float32."""
        for parameter in self.network.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])

    def release(self) -> None:
        """Give the memory of the weights back. The model cannot be used again."""
        for parameter in self.network.parameters():
            parameter.data = parameter.data.new_empty(0)
        gc.collect()  # tracing leaves cycles behind

    def compute_in(self, dtype: str) -> None:
        """Set the dtype of the feature maps."""
        if hasattr(self.network, "compute_dtype"):
            setattr(self.network, "compute_dtype", DTYPES[dtype])  # noqa: B010 - nn.Module declares no such attribute
        elif dtype != "fp32":
            raise ValueError(f"a {type(self.network).__name__} computes in fp32 only, asked for {dtype}")
