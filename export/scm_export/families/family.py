"""What a family is: how its checkpoints are known, and how one becomes a :class:`~scm_export.model.Model`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scm_export.checkpoints import Loaded
from scm_export.model import Model
from scm_runtime.bundle.manifest import Dtype


@dataclass(frozen=True)
class BuildOptions:
    """What a user may say about a model beyond its checkpoint."""

    decoder: Path | None = None
    """Folder of an autoencoder (diffusers), for models of latents whose checkpoint brings none."""
    latents: bool = False
    """Leave the decoder out: samples are latents."""
    with_encoder: bool = False
    preview_decoder: Path | None = None
    """Folder of a small autoencoder (diffusers' AutoencoderTiny)."""
    guide: Loaded | None = None
    """A worse version of a diffusion model, to lead it away from (autoguidance)."""
    size: tuple[int, int] | None = None
    """Height and width of the images, pixels; None for the checkpoint's own."""


@dataclass(frozen=True)
class Family:
    """One kind of model."""

    looks_for: str
    """What its checkpoints hold, for people: "a diffusers folder with a SanaTransformer2DModel"."""
    recognises: Callable[[Loaded], bool]
    build: Callable[[Loaded, BuildOptions], Model]
    """Raises CheckpointError for contents that do not fit the family."""
    dtype: Dtype = "fp32"
    """To store the weights in unless the user says otherwise."""
    refuses: Mapping[Dtype, str] = field(default_factory=dict)
    """Dtypes that its models cannot be exported in, each with the reason and what to use."""
