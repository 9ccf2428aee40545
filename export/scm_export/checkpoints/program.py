"""A user's network as code: an ``nn.Module`` from a factory or a program file, and its description from a ``--config`` file."""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scm_export.checkpoints.header import Header
from scm_export.checkpoints.torch_file import current_folder_importable
from scm_export.errors import CheckpointError
from scm_runtime.common.message_text import first_line
from scm_runtime.errors import InvalidArgumentError

FACTORY = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")
"""``package.module:function``."""


@dataclass(frozen=True)
class Program:
    """A network as a module, ``(x, level, **conditioning) -> Tensor``, and how to sample from it."""

    header: Header
    network: nn.Module
    description: str
    weights: dict[str, Tensor] | None = None
    """Tensors to load into the network; None if it already has its weights."""
    inputs: tuple[str, ...] | None = None
    """Names of the network's inputs, state and level first; None if they are not known."""
    original: nn.Module | None = None
    """The network as torch itself runs it, for verification; None if ``network`` is the original."""

    def describe(self) -> str:
        """Short description for error messages."""
        return self.description


def call_factory(factory: str, arguments: dict[str, Any], option: str = "factory") -> nn.Module:
    """Call ``package.module:function``, which may also be in the current folder, as with ``python -m``. ``option`` is the option that names it.

    Returns:
        A copy of the network if it can be copied, else the network itself. An export modifies its network and finally releases the weights, and
        the factory's network may be in use elsewhere.

    Raises:
        InvalidArgumentError: there is no such function.
        CheckpointError: the function fails, or does not return a module.
    """
    if not (found := FACTORY.fullmatch(factory)):
        raise InvalidArgumentError(f"{option} must be package.module:function, got {factory!r}")
    with current_folder_importable():
        function = _find(found[1], found[2], option)
        try:
            network = function(**arguments)
        except Exception as error:
            given = f" with the arguments {', '.join(arguments)} of [config.arguments]" if arguments else ""
            raise CheckpointError(f"the {option} {factory} raised {type(error).__name__}{given}: {first_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise CheckpointError(f"the {option} {factory} must return a torch.nn.Module, got {type(network).__name__}")
    return _copy(network)


def _copy(network: nn.Module) -> nn.Module:
    """Copy a network but share the memory of its parameters, which is never written to. Return the network itself if its class cannot be copied."""
    try:
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in network.parameters() if type(p) is nn.Parameter}
        copied: nn.Module = copy.deepcopy(network, memo)
    except Exception:  # noqa: BLE001 - copying may run the user's code, and a correct bundle does not need a copy
        return network
    return copied if all(parameter.is_leaf for parameter in copied.parameters()) else network  # TorchScript's parameters are not leaves


def copy_network(network: nn.Module, what: str) -> nn.Module:
    """Copy a network that is in use, onto the CPU. Raises CheckpointError if it cannot be copied."""
    copied = _copy(network)
    if copied is network:
        raise CheckpointError(
            f"{what} cannot be copied with copy.deepcopy, and an export would change it. Export its state_dict with a factory that returns such a network"
        )
    return copied.cpu()


def weights_sha256(network: nn.Module) -> str:
    """SHA-256 of names, dtypes, shapes and values of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        if not isinstance(tensor, Tensor):  # extra state of a module
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _find(module_name: str, function_name: str, option: str) -> Callable[..., Any]:
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise InvalidArgumentError(f"{option}: there is no module {error.name!r}. Run scm-export in the folder that holds it, or install it") from error
        raise CheckpointError(f"importing the module {module_name} of the {option} raised {type(error).__name__}: {first_line(error)}") from error
    for part in function_name.split("."):
        if not hasattr(value, part):
            close = difflib.get_close_matches(part, [name for name in dir(value) if callable(getattr(value, name, None))], n=1)
            raise InvalidArgumentError(f"{option}: {module_name} has no {function_name!r}{f'; did you mean {close[0]!r}?' if close else ''}")
        value = getattr(value, part)
    if not callable(value):
        raise InvalidArgumentError(f"{option}: {module_name}:{function_name} must be a function, got {type(value).__name__}")
    return value  # type: ignore[no-any-return]  # the user's function has no known type
