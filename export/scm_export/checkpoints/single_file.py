"""A ``.safetensors`` file of Stable Diffusion in its original layout, presented as the diffusers folder that it is converted to.

The names of tensors are converted by diffusers' own functions. Nothing is downloaded: configurations follow from the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from scm_export.checkpoints.diffusers_folder import DiffusersFolder
from scm_export.checkpoints.original_layout import TEXT_PREFIXES, UNET_PREFIX, VAE_PREFIX, Layers, model_type, unet_config, vae_config
from scm_export.checkpoints.reading import reading
from scm_export.errors import CheckpointError
from scm_runtime.bundle.checksums import sha256
from scm_runtime.common.installed import install_extras
from scm_runtime.common.message_text import first_line, printable
from scm_runtime.errors import MissingDependencyError

UNET, VAE = "unet", "vae"
PARTS = {UNET_PREFIX: "the U-Net", VAE_PREFIX: "the autoencoder", **dict.fromkeys(TEXT_PREFIXES, "a text encoder")}


def is_original_layout(names: Iterable[str]) -> bool:
    """Return True if tensors have the names of Stable Diffusion's original files."""
    return any(name.startswith(tuple(PARTS)) for name in names)


class SingleFile(DiffusersFolder):
    """The U-Net and the autoencoder of a file, as components of a folder. Its text encoders have no tokenizer, and are not among them."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of a file by name.

        Raises:
            CheckpointError: there is no U-Net among them.
        """
        super().__init__(path)
        self._tensors = dict(tensors)
        where = f"'{path}'"
        self._unet, self._vae = Layers(tensors, UNET_PREFIX, where), Layers(tensors, VAE_PREFIX, where)
        if not self._unet.tensors:
            found = ", ".join(dict.fromkeys(what for prefix, what in PARTS.items() if any(name.startswith(prefix) for name in tensors)))
            raise CheckpointError(f"{where} has no U-Net ({UNET_PREFIX}*), only {found}. Export the file of the whole model.")

    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        return sha256(self.path)

    def describe(self) -> str:
        """Short description for error messages."""
        return f"the file '{self.path}' in the original layout of Stable Diffusion{' XL' if model_type(self._unet) == 'sdxl' else ''}"

    @property
    def index(self) -> dict[str, Any]:
        """Empty: the file has no description of a pipeline."""
        return {}

    @cached_property
    def classes(self) -> dict[str, str]:
        """Class names of the components that are in the file, by component name."""
        return {UNET: "UNet2DConditionModel", **({VAE: "AutoencoderKL"} if self._vae.tensors else {})}

    def config(self, component: str) -> dict[str, Any]:
        """Infer the configuration of a component. Raises CheckpointError if the network has another structure than Stable Diffusion's."""
        return unet_config(self._unet) if component == UNET else vae_config(self._vae, model_type(self._unet))

    def weights(self, component: str) -> dict[str, Tensor]:
        """Return the tensors of a component under diffusers' names, in their stored dtype. Raises CheckpointError if they cannot be converted."""
        try:
            from diffusers.loaders import single_file_utils
        except ImportError as error:
            raise MissingDependencyError(f"converting a file of Stable Diffusion needs diffusers ({error}):\n  {install_extras('export')}") from error
        config = self.config(component)
        convert = single_file_utils.convert_ldm_unet_checkpoint if component == UNET else single_file_utils.convert_ldm_vae_checkpoint
        with reading(self.path):
            try:
                converted: dict[str, Tensor] = convert(self._tensors, config)
            except (KeyError, AttributeError, IndexError) as error:
                raise CheckpointError(
                    f"{self.describe()} lacks tensors that diffusers needs ({type(error).__name__}: {first_line(error)}). Download it again."
                ) from error
        if component == UNET:
            self._check_complete(converted)
        return converted

    def _check_complete(self, converted: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError if diffusers' conversion left tensors of the U-Net out: it ignores names that it does not know."""
        kept = {tensor.data_ptr() for tensor in converted.values()}
        if lost := [name for name, tensor in self._unet.tensors.items() if tensor.data_ptr() not in kept]:
            raise CheckpointError(
                f"{self.describe()} has tensors that a U-Net of Stable Diffusion has not, such as '{printable(UNET_PREFIX + lost[0])}': it is not supported"
            )
