"""diffusers' own model classes, made from a folder's configuration and weights, and made fit for tracing with a dynamic batch."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from scm_export.checkpoints import DiffusersFolder
from scm_export.errors import CheckpointError
from scm_export.precision import is_norm
from scm_runtime.errors import InvalidArgumentError, MissingDependencyError

# What the layers of attention were called in folders saved before diffusers 0.17, sd-vae-ft-mse among them.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(rf"(attentions\.\d+)\.({'|'.join(OLD_ATTENTION_NAMES)})\.(weight|bias)$")


def make_network(folder: DiffusersFolder, component: str) -> nn.Module:
    """The network of a folder's component, of diffusers' own class, on the meta device: its weights are still to come.

    Raises:
        CheckpointError: diffusers has no such class, or refuses the configuration.
        MissingDependencyError: diffusers is not installed.
    """
    try:
        import diffusers  # takes seconds: not for families that do not need it
    except ImportError as error:
        raise MissingDependencyError(f"reading a diffusers folder needs diffusers ({error}):\n  pip install 'scm-runtime[export]'") from error
    name, config = folder.classes[component], folder.config(component)
    try:
        with torch.device("meta"), _quiet():
            network = getattr(diffusers, name).from_config(config)
    except Exception as error:
        raise CheckpointError(f"diffusers {diffusers.__version__} cannot make a {name} from '{folder.path / component}': {_reason(error)}") from error
    assert isinstance(network, nn.Module)
    return network.eval().requires_grad_(False)


def read_weights(folder: DiffusersFolder, component: str, *parts: str) -> dict[str, Tensor]:
    """A component's tensors, under the names that diffusers uses today; with ``parts``, only those of these children.

    Raises:
        CheckpointError: there are none, or a file is damaged.
    """
    weights = folder.weights(component)
    kept = (name for name in weights if not parts or name.split(".")[0] in parts)
    return {_OLD_ATTENTION.sub(lambda old: f"{old[1]}.{OLD_ATTENTION_NAMES[old[2]]}.{old[3]}", name): weights[name] for name in kept}


def share_weights(network: nn.Module, other: nn.Module) -> None:
    """Give a network made by :func:`make_network` the weights of another of the same configuration: not copies, the same."""
    network.load_state_dict(dict(other.named_parameters()), assign=True)


def make_scheduler(folder: DiffusersFolder, name: str) -> Any:
    """The folder's scheduler, of diffusers' class ``name``; with that class's defaults where the folder has none.

    Raises:
        CheckpointError: it is of another class, or diffusers refuses its configuration.
    """
    import diffusers

    found = folder.classes.get("scheduler")
    if found not in (None, name):
        raise CheckpointError(f"the scheduler of {folder.describe()} must be a {name}, got {found}")
    config = {} if found is None else folder.config("scheduler")
    try:
        with _quiet():
            return getattr(diffusers, name).from_config(config)
    except Exception as error:
        raise CheckpointError(f"diffusers {diffusers.__version__} cannot make a {name} from '{folder.path / 'scheduler'}': {_reason(error)}") from error


def sample_size(config: Any, size: tuple[int, int] | None, unit: int = 1) -> tuple[int, int]:
    """Height and width of the state of a U-Net, from its configuration, or from a size in pixels that is ``unit`` times as large.

    Raises:
        CheckpointError: the configuration has none.
        InvalidArgumentError: the size asked for is no multiple of the unit.
    """
    if size is not None:
        if any(side <= 0 or side % unit for side in size):
            raise InvalidArgumentError(f"size must be a height and a width in multiples of {unit} pixels, got {size[0]}x{size[1]}")
        return size[0] // unit, size[1] // unit
    match config.sample_size:
        case int(side):
            return side, side
        case [int(height), int(width)]:
            return height, width
    raise CheckpointError(f"sample_size of the U-Net must be a size or a height and a width, got {config.sample_size!r}. Say the size with --size.")


def check_size(unet: nn.Module, sample_shape: tuple[int, ...], **conditioning: Tensor) -> None:
    """Run a U-Net once on the meta device, before its weights are read. Raises InvalidArgumentError: it has no output of its input's shape."""
    x = torch.empty(1, *sample_shape, device="meta")
    try:
        found = unet(x, torch.zeros(1, device="meta"), return_dict=False, **conditioning)[0].shape
    except (RuntimeError, ValueError) as error:
        raise InvalidArgumentError(f"the {type(unet).__name__} cannot take a state of {list(sample_shape)}: {_reason(error)}. Try another --size.") from error
    if found != x.shape:
        raise InvalidArgumentError(f"the {type(unet).__name__} makes {list(found[1:])} of a state of {list(sample_shape)}. Try another --size.")


def free_batch(network: nn.Module) -> None:
    """Let the batch be dynamic: diffusers' upsampling asks for its size, to go round a limit of a CUDA kernel that no traced graph has."""
    from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
    from diffusers.models.upsampling import Upsample2D

    for module in network.modules():
        if isinstance(module, Upsample2D) and not module.use_conv_transpose and module.norm is None and module.interpolate:
            module.forward = partial(_upsample, module)
        elif isinstance(module, ResnetBlock2D | ResnetBlockCondNorm2D) and module.upsample is not None:
            # Both are applied at the same place to the same tensors; only before upsample is the batch looked at.
            module.upsample, module.downsample = None, module.upsample


def _upsample(module: Any, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
    """``Upsample2D.forward``."""
    y = nn.functional.interpolate(hidden_states, size=output_size, scale_factor=2.0 if output_size is None else None, mode="nearest")
    if module.use_conv:
        y = (module.conv if module.name == "conv" else module.Conv2d_0)(y)
    return y


def keep_times(unet: nn.Module) -> None:
    """Give a U-Net's time embedding the sinusoids as they are computed, in float32: diffusers rounds them to the dtype of the weights in between."""
    sinusoids: list[Tensor] = []

    def remember(_module: nn.Module, _args: Any, output: Tensor) -> None:
        sinusoids[:] = [output]

    unet.get_submodule("time_proj").register_forward_hook(remember)
    unet.get_submodule("time_embedding").register_forward_pre_hook(lambda _module, args: (sinusoids.pop(), *args[1:]))


def unet_islands(name: str, module: nn.Module) -> bool:
    """What computes in float32 in a U-Net of diffusers: times and norms."""
    return name.endswith("time_embedding") or is_norm(name, module)


@contextmanager
def injected_noise(scheduler: ModuleType, noises: Sequence[Tensor]) -> Iterator[None]:
    """Within the block the scheduler of this module draws these, in turn, in the place of random numbers of its own."""
    draws = iter(noises)
    with patch.object(scheduler, "randn_tensor", lambda *_args, **_kwargs: next(draws)):
        yield


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' warnings of configuration fields that it does not know: folders are older or newer than it."""
    log = logging.getLogger("diffusers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
