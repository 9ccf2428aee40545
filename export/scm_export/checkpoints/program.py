"""A network that is code: somebody's ``nn.Module``, made by a factory or read from a program, and what a ``--config`` file says of it."""

from __future__ import annotations

import copy
import difflib
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from scm_export.checkpoints.header import Header
from scm_export.checkpoints.torch_file import current_folder_importable, first_line
from scm_export.errors import CheckpointError
from scm_runtime.errors import InvalidArgumentError


@dataclass(frozen=True)
class Program:
    """A network as a module, ``(x, level, **conditioning) -> Tensor``, and how it is sampled."""

    header: Header
    network: nn.Module
    description: str
    weights: dict[str, Tensor] | None = None
    """To be loaded into the network; None: it has its own."""
    inputs: tuple[str, ...] | None = None
    """Names of the network's inputs, state and level first, where they are known."""
    original: nn.Module | None = None
    """What the network is this project's reading of, for verification, where there is such."""

    def describe(self) -> str:
        """A few words for messages."""
        return self.description


def make_network(factory: str, arguments: dict[str, Any]) -> nn.Module:
    """Call ``package.module:function``, looked for in the current folder too, as ``python -m`` does.

    Returns:
        A copy of what it returns, where that can be copied: an export changes its network and empties it in the end, and the factory's may be in use elsewhere.

    Raises:
        InvalidArgumentError: no such function.
        CheckpointError: it fails, or returns no module.
    """
    if not (found := re.fullmatch(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)", factory)):
        raise InvalidArgumentError(f"factory must be package.module:function, got {factory!r}")
    with current_folder_importable():
        function = _find(found[1], found[2])
        try:
            network = function(**arguments)
        except Exception as error:
            given = f" with the arguments {', '.join(arguments)} of [config.arguments]" if arguments else ""
            raise CheckpointError(f"the factory {factory} raised {type(error).__name__}{given}: {first_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise CheckpointError(f"the factory {factory} must return a torch.nn.Module, got {type(network).__name__}")
    return _copy(network)


def _copy(network: nn.Module) -> nn.Module:
    """A network of its own over the same parameters' memory, which nobody writes to; or itself, where its class does not allow a copy."""
    try:
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in network.parameters() if type(p) is nn.Parameter}
        copied: nn.Module = copy.deepcopy(network, memo)
    except Exception:  # noqa: BLE001 - the code that copies may be the user's, and a copy is not needed for a right bundle
        return network
    return copied if all(parameter.is_leaf for parameter in copied.parameters()) else network  # TorchScript's are not


def _find(module_name: str, function_name: str) -> Callable[..., Any]:
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise InvalidArgumentError(f"factory: there is no module {error.name!r}. Run scm-export in the folder that holds it, or install it") from error
        raise CheckpointError(f"importing the factory's module {module_name} raised {type(error).__name__}: {first_line(error)}") from error
    for part in function_name.split("."):
        if not hasattr(value, part):
            close = difflib.get_close_matches(part, [name for name in dir(value) if callable(getattr(value, name, None))], n=1)
            raise InvalidArgumentError(f"factory: {module_name} has no {function_name!r}{f'; did you mean {close[0]!r}?' if close else ''}")
        value = getattr(value, part)
    if not callable(value):
        raise InvalidArgumentError(f"factory: {module_name}:{function_name} must be a function, got {type(value).__name__}")
    return value  # type: ignore[no-any-return]  # a callable of the user's
