"""The definition of a family: how to recognize its checkpoints, and how to build a :class:`~scm_export.model.Model` from one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from scm_export.checkpoints import Loaded
from scm_export.choices import PredictionType, SchedulerName
from scm_export.lora import Lora
from scm_export.model import Model
from scm_runtime.bundle.manifest import Dtype


@dataclass(frozen=True)
class BuildOptions:
    """User options for building a model from its checkpoint."""

    decoder: Path | nn.Module | None = None
    """Folder of an autoencoder (diffusers) or a decoder as a module, for latent models whose checkpoint has none."""
    latents: bool = False
    """Leave out the decoder: samples are latents."""
    with_encoder: bool = False
    """Also export the autoencoder's encoder."""
    preview_decoder: Path | None = None
    """Folder of a small autoencoder (diffusers' AutoencoderTiny)."""
    guide: Loaded | None = None
    """A weaker version of a diffusion model, for autoguidance."""
    scheduler: SchedulerName | None = None
    """Scheduler of a distilled Stable Diffusion model; None for the checkpoint's own."""
    prediction_type: PredictionType | None = None
    """What its U-Net predicts; None for the value in the checkpoint."""
    guidance: bool = False
    """Export it with classifier-free guidance."""
    size: tuple[int, int] | None = None
    """Height and width of the images in pixels; None for the size in the checkpoint."""
    text: bool = True
    """Read the text encoder and its tokenizer, if the checkpoint has them."""
    loras: tuple[Lora, ...] = ()
    """LoRA files to add to the network's weights, with :func:`~scm_export.lora.merge_loras`, after these are loaded."""
    test_parametrisation: bool = True
    """Test the parametrization of a user-defined network, which evaluates the network 4 to 20 times."""


@dataclass(frozen=True)
class Family:
    """One kind of model."""

    looks_for: str
    """Description of its checkpoints for error messages, such as "a diffusers folder with a SanaTransformer2DModel"."""
    recognizes: Callable[[Loaded], bool]
    """Returns True if a checkpoint belongs to the family."""
    build: Callable[[Loaded, BuildOptions], Model]
    """Builds the model; raises CheckpointError for contents that do not fit the family."""
    dtype: Dtype = "fp32"
    """Default dtype of the stored weights."""
    takes_lora: bool = False
    """Whether ``build`` adds the LoRA files of the options to the weights."""
    refuses: Mapping[Dtype, str] = field(default_factory=dict)
    """Dtypes in which its models cannot be exported, each with the reason and an alternative."""
