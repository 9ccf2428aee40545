"""Builds diffusers' model classes from a folder's configuration and weights, and prepares them for tracing with a dynamic batch size."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import get_ident
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from scm_export.checkpoints import DiffusersFolder, Loaded
from scm_export.errors import CheckpointError
from scm_export.precision import is_norm
from scm_runtime.common.installed import install_extras
from scm_runtime.common.message_text import first_line
from scm_runtime.errors import InvalidArgumentError, MissingDependencyError

# Names of attention layers in folders saved before diffusers 0.17, such as sd-vae-ft-mse.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
MAX_MODULES = 10_000  # the largest published networks have some 3 000
MAX_SIDE = 4096  #       of the state; the positional embedding of SANA is computed for the whole state

_OLD_ATTENTION = re.compile(rf"(attentions\.\d+)\.({'|'.join(OLD_ATTENTION_NAMES)})\.(weight|bias)$")


def find_component(loaded: Loaded, family: str, class_name: str) -> tuple[DiffusersFolder, str]:
    """Return a diffusers folder and the name of its component of one class.

    Raises:
        CheckpointError: the checkpoint is not a diffusers folder, or has no such component.
    """
    component = loaded.find(class_name) if isinstance(loaded, DiffusersFolder) else None
    if not isinstance(loaded, DiffusersFolder) or component is None:
        raise CheckpointError(f"the family {family} is read from a diffusers folder with a {class_name}, got {loaded.describe()}")
    return loaded, component


def make_network(folder: DiffusersFolder, component: str) -> nn.Module:
    """Create the network of a folder's component, an instance of diffusers' class, on the meta device, without weights.

    Raises:
        CheckpointError: diffusers has no such class, or rejects the configuration.
        MissingDependencyError: diffusers is not installed.
    """
    try:
        import diffusers  # takes seconds, so only where it is needed
    except ImportError as error:
        raise MissingDependencyError(f"reading a diffusers folder needs diffusers ({error}):\n  {install_extras('export')}") from error
    name, config = folder.classes[component], folder.config(component)
    try:
        with torch.device("meta"), quiet("diffusers"), limited_modules():
            network = getattr(diffusers, name).from_config(config)
    except Exception as error:
        raise _not_created(name, folder.path / component, error) from error
    assert isinstance(network, nn.Module)
    return network.eval().requires_grad_(False)


def read_weights(folder: DiffusersFolder, component: str, *parts: str) -> dict[str, Tensor]:
    """Read the tensors of a component, under the names that current diffusers uses; with ``parts``, only those of these submodules.

    Raises:
        CheckpointError: there is no file of weights, or one is damaged.
    """
    weights = folder.weights(component)
    kept = (name for name in weights if not parts or name.split(".")[0] in parts)
    return {_OLD_ATTENTION.sub(lambda old: f"{old[1]}.{OLD_ATTENTION_NAMES[old[2]]}.{old[3]}", name): weights[name] for name in kept}


def share_weights(network: nn.Module, other: nn.Module) -> None:
    """Give a network from :func:`make_network` the weights of another one with the same configuration, without copying them."""
    network.load_state_dict(dict(other.named_parameters()), assign=True)


def make_scheduler(folder: DiffusersFolder, name: str) -> Any:
    """Create the folder's scheduler, an instance of diffusers' class ``name``; with the defaults of the class if the folder has no scheduler.

    Raises:
        CheckpointError: the folder's scheduler is of another class, or diffusers rejects its configuration.
    """
    found = folder.classes.get("scheduler")
    if found not in (None, name):
        raise CheckpointError(f"the scheduler of {folder.describe()} must be a {name}, got {found}")
    return scheduler_from_config(folder, name, {} if found is None else folder.config("scheduler"))


def scheduler_from_config(folder: DiffusersFolder, name: str, config: Mapping[str, Any]) -> Any:
    """Create a scheduler, an instance of diffusers' class ``name``. The configuration may be another scheduler's. Raises CheckpointError."""
    import diffusers

    try:
        with quiet("diffusers"):
            return getattr(diffusers, name).from_config(dict(config))
    except Exception as error:
        raise _not_created(name, folder.path / "scheduler", error) from error


def _not_created(name: str, folder: Path, error: Exception) -> CheckpointError:
    import diffusers

    return CheckpointError(f"diffusers {diffusers.__version__} cannot create a {name} from '{folder}': {first_line(error)}")


def sample_size(config: Any, size: tuple[int, int] | None, unit: int = 1) -> tuple[int, int]:
    """Return height and width of the state of a U-Net.

    Args:
        config: configuration of the U-Net.
        size: requested height and width of the images in pixels; None for the size in the configuration.
        unit: pixels per latent along each axis.

    Raises:
        CheckpointError: the configuration has no size.
        InvalidArgumentError: the requested size is not a multiple of ``unit``.
    """
    if size is not None:
        if any(side <= 0 or side % unit or side > MAX_SIDE * unit for side in size):
            raise InvalidArgumentError(f"size must be a height and a width of at most {MAX_SIDE * unit} in multiples of {unit} pixels, got {size[0]}x{size[1]}")
        return size[0] // unit, size[1] // unit
    match config.sample_size:
        case int(side) if 1 <= side <= MAX_SIDE:
            return side, side
        case [int(height), int(width)] if 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
            return height, width
    raise CheckpointError(
        f"sample_size of the U-Net must be a size or a height and a width, from 1 to {MAX_SIDE}, got {config.sample_size!r:.100}. Give the size with --size."
    )


def check_size(unet: nn.Module, sample_shape: tuple[int, ...], **conditioning: Any) -> None:
    """Run a U-Net once on the meta device, before its weights are read. Raises InvalidArgumentError if the output does not have the shape of the input."""
    x = torch.empty(1, *sample_shape, device="meta")
    try:
        found = unet(x, torch.zeros(1, device="meta"), return_dict=False, **conditioning)[0].shape
    except (RuntimeError, ValueError) as error:
        raise InvalidArgumentError(
            f"the {type(unet).__name__} cannot take a state of {list(sample_shape)}: {first_line(error)}. Try another --size."
        ) from error
    if found != x.shape:
        raise InvalidArgumentError(f"the {type(unet).__name__} returns {list(found[1:])} for a state of {list(sample_shape)}. Try another --size.")


def make_batch_dynamic(network: nn.Module) -> None:
    """Make the batch size dynamic. diffusers' upsampling compares it with the limit of a CUDA kernel, which a traced graph does not have."""
    from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
    from diffusers.models.upsampling import Upsample2D

    for module in network.modules():
        if isinstance(module, Upsample2D) and not module.use_conv_transpose and module.norm is None and module.interpolate:
            module.forward = partial(_upsample, module)
        elif isinstance(module, ResnetBlock2D | ResnetBlockCondNorm2D) and module.upsample is not None:
            # Both are applied at the same place to the same tensors, but diffusers checks the batch size only before upsample.
            module.upsample, module.downsample = None, module.upsample


def _upsample(module: Any, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
    """Replacement for ``Upsample2D.forward`` that does not read the batch size."""
    y = nn.functional.interpolate(hidden_states, size=output_size, scale_factor=2.0 if output_size is None else None, mode="nearest")
    if module.use_conv:
        y = (module.conv if module.name == "conv" else module.Conv2d_0)(y)
    return y


def keep_time_features_fp32(unet: nn.Module) -> None:
    """Pass the sinusoids to a U-Net's time embedding in float32, as they were computed. diffusers rounds them to the dtype of the weights."""
    sinusoids: list[Tensor] = []

    def remember(_module: nn.Module, _args: Any, output: Tensor) -> None:
        sinusoids[:] = [output]

    unet.get_submodule("time_proj").register_forward_hook(remember)
    unet.get_submodule("time_embedding").register_forward_pre_hook(lambda _module, args: (sinusoids.pop(), *args[1:]))


def unet_keeps_fp32(name: str, module: nn.Module) -> bool:
    """Return True for the modules of a diffusers U-Net that compute in float32: embeddings of the time and of SDXL's sizes, and norms."""
    return name.endswith(("time_embedding", "add_embedding")) or is_norm(name, module)


@contextmanager
def injected_noise(scheduler: ModuleType, noises: Sequence[Tensor]) -> Iterator[None]:
    """Within the block, the scheduler in this module uses these tensors, in order, instead of random numbers."""
    draws = iter(noises)
    with patch.object(scheduler, "randn_tensor", lambda *_args, **_kwargs: next(draws)):
        yield


@contextmanager
def limited_modules() -> Iterator[None]:
    """Within the block, this thread can create at most ``MAX_MODULES`` modules: a configuration may claim millions of layers. More raise ValueError."""
    thread, count = get_ident(), 0

    def check(*_: object) -> None:
        nonlocal count
        count += get_ident() == thread
        if count > MAX_MODULES:
            raise ValueError(f"the configuration describes more than {MAX_MODULES} modules")

    hook = register_module_module_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Within the block, suppress the warnings of diffusers or transformers about unknown fields of a configuration: folders may be older or newer than them."""
    log = logging.getLogger(library)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
