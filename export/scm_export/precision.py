"""Run somebody else's network in the dtype a graph computes in, whatever dtype its weights are stored in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from scm_export.promotion import MatchDtypes

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

Island = Callable[[str, nn.Module], bool]


def norms(_name: str, module: nn.Module) -> bool:
    """The islands that every network has: what divides by a sum of squares, whose half-precision range is too small."""
    return isinstance(module, NORMS) or type(module).__name__ == "RMSNorm"


class Precision(nn.Module):
    """A network that computes in ``compute_dtype``, but in float32 in its islands; float32 at its borders.

    The weights are cast where they are read: in a traced graph each is one Cast of what the weights file holds, so that one file serves the
    graphs of every dtype.
    """

    def __init__(self, network: nn.Module, islands: Island = norms, *, match_dtypes: bool = False, wide: Collection[str] = ()) -> None:
        """Wrap a network.

        Args:
            network: called with the wrapper's own arguments, floating tensors cast; but one number a sample, a time or a scale, stays float32.
            islands: (dotted name, module) to whether the module computes in float32.
            match_dtypes: the network was not written for half precision. Its buffers stay float32 too, also those of later calls, and its
                operators are helped (``promotion.py``).
            wide: names of parameters that stay float32 wherever they are used.
        """
        super().__init__()
        self.network = network
        self.compute_dtype = torch.float32
        self._match_dtypes = match_dtypes
        self._wide: set[str] = set(wide)
        for name, module in network.named_modules():
            if islands(name, module):
                module.register_forward_pre_hook(_enter, with_kwargs=True)
                module.register_forward_hook(self._leave)
                self._wide |= {f"{name}.{inner}" if name else inner for inner, _ in _tensors(module)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        dtype = self.compute_dtype
        wide = self._wide | {name for name, _ in self.network.named_buffers()} if self._match_dtypes else self._wide
        tensors = {name: _cast(tensor, torch.float32 if name in wide else dtype) for name, tensor in _tensors(self.network)}
        args, kwargs = tree_map(lambda value: value if _is_per_sample(value) else _cast(value, dtype), (args, kwargs))
        with MatchDtypes() if self._match_dtypes else nullcontext():
            output = functional_call(self.network, tensors, args, kwargs)
        return tree_map(lambda value: _cast(value, torch.float32), output)

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        return tree_map(lambda value: _cast(value, self.compute_dtype), output)


def _enter(_module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
    return tree_map(lambda value: _cast(value, torch.float32), (args, dict(kwargs)))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def _is_per_sample(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim <= 1


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
