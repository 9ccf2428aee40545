"""Builds transformers' text encoders from a folder's configuration and weights, without running code of the folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scm_export.checkpoints import DiffusersFolder
from scm_export.errors import CheckpointError
from scm_export.families.diffusers_networks import limited_modules, quiet, share_weights
from scm_export.families.weights import load_weights
from scm_export.precision import is_norm
from scm_runtime.common.installed import install_extras
from scm_runtime.common.message_text import first_line, printable
from scm_runtime.errors import MissingDependencyError

WITHOUT_TEXT = "--no-text leaves the text encoder out."
Rename = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def import_transformers() -> Any:
    """Import transformers. Raises MissingDependencyError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(f"exporting a text encoder needs transformers ({error}):\n  {install_extras('export')}\n{WITHOUT_TEXT}") from error
    return transformers


def has_components(folder: DiffusersFolder, *components: str) -> bool:
    """Return True if the folder has all of these components, False if it has none of them.

    Raises:
        CheckpointError: the folder has some of them.
    """
    missing = [name for name in components if name not in folder.classes]
    if missing and len(missing) < len(components):
        raise CheckpointError(f"{folder.describe()} has no {' and no '.join(missing)}, which prompts need too. Download the folder again. {WITHOUT_TEXT}")
    return not missing


def check_class(folder: DiffusersFolder, component: str, expected: Sequence[str]) -> str:
    """Return the class name of a component. Raises CheckpointError if it is not one of ``expected``."""
    found = folder.classes[component]
    if found not in expected:
        raise CheckpointError(f"the {component} of {folder.describe()} must be a {' or '.join(expected)}, got '{printable(found)}'. {WITHOUT_TEXT}")
    return found


def check_sizes(folder: DiffusersFolder, found: dict[str, int], wanted: dict[str, int]) -> None:
    """Raise CheckpointError if the encoder's outputs do not have the sizes that the network takes."""
    for name, size in wanted.items():
        if found[name] != size:
            raise CheckpointError(
                f"the text encoder of {folder.describe()} returns {name} of size {found[name]}, the network takes {size}: they belong to different models. "
                f"{WITHOUT_TEXT}"
            )


def make_encoders(
    folder: DiffusersFolder,
    component: str,
    class_name: str,
    *,
    part: str = "",
    attention: str = "eager",
    buffers: Callable[[Any, Any], None] = lambda network, config: None,
    rename: Rename = lambda weights: weights,
) -> tuple[nn.Module, nn.Module]:
    """Create the text encoder of a component twice, over one set of weights: one for the graph, and an unmodified one for the reference.

    Args:
        folder: holds the component.
        component: such as ``text_encoder_2``.
        class_name: transformers' class.
        part: submodule to take; "" for the whole network.
        attention: transformers' implementation of attention.
        buffers: sets the buffers that are not in the file, of a network that has none on any device yet.
        rename: maps the tensors of the file to the names of the network, or of ``part``.

    Raises:
        CheckpointError: transformers rejects the configuration, or the weights do not fit it.
        MissingDependencyError: transformers is not installed.
    """
    transformers = import_transformers()
    given = folder.config(component)
    # Private entries and implementations select code to run; all others are data.
    config = {name: value for name, value in given.items() if not name.startswith("_") and "implementation" not in name}
    networks = []
    try:
        with quiet("transformers"):
            cls = getattr(transformers, class_name)
            for _ in range(2):
                settings = cls.config_class.from_dict(config)
                with torch.device("meta"), limited_modules():
                    network = cls._from_config(settings, attn_implementation=attention, dtype=torch.float32)
                network = network.get_submodule(part) if part else network
                buffers(network, settings)
                networks.append(network.eval().requires_grad_(False))
    except Exception as error:
        where = folder.path / component
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot create a {class_name} from '{where}': {first_line(error)}. {WITHOUT_TEXT}"
        ) from error
    network, original = networks
    load_weights(network, rename(folder.weights(component)))
    share_weights(original, network)
    if strange := [name for one in networks for name, tensor in one.named_buffers() if tensor.is_meta]:
        raise CheckpointError(f"the {class_name} of '{folder.path / component}' computes {strange[0]} in a way that is not supported. {WITHOUT_TEXT}")
    return network, original


def keeps_fp32(name: str, module: nn.Module) -> bool:
    """Return True for the modules of a text encoder that compute in float32: norms, and angles of rotary embeddings."""
    return is_norm(name, module) or type(module).__name__.endswith(("RMSNorm", "LayerNorm", "RotaryEmbedding"))
