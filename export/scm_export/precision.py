"""``Precision``: run any network in a graph's compute dtype, whatever dtype its weights are stored in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from scm_export.promotion import PromoteDtypes

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

KeepInFp32 = Callable[[str, nn.Module], bool]
"""(dotted name, module) to True if the module computes in float32 in every graph."""


def is_norm(_name: str, module: nn.Module) -> bool:
    """Return True for normalization layers: they divide by a sum of squares, which overflows in half precision."""
    return isinstance(module, NORMS) or type(module).__name__ == "RMSNorm"


class Precision(nn.Module):
    """A network that computes in ``compute_dtype``, except for the modules kept in float32. Its inputs and outputs are float32.

    Weights are cast where they are read. In a traced graph each cast is one Cast node on the stored weight, so that one weights file serves the
    graphs of every dtype.
    """

    def __init__(self, network: nn.Module, keep_in_fp32: KeepInFp32 = is_norm, *, promote_dtypes: bool = False, fp32_parameters: Collection[str] = ()) -> None:
        """Wrap a network.

        Args:
            network: called with the wrapper's arguments. Floating-point tensors are cast to the compute dtype, except those with one number per sample,
                such as times and scales, which stay float32.
            keep_in_fp32: selects the modules that compute in float32.
            promote_dtypes: for networks that were not written for half precision. Their buffers stay float32, including buffers created by later
                calls, and operands of different dtypes are promoted to one (``promotion.py``).
            fp32_parameters: names of parameters that stay float32 wherever they are used.
        """
        super().__init__()
        self.network = network
        self.compute_dtype = torch.float32
        self._promote_dtypes = promote_dtypes
        self._fp32_names: set[str] = set(fp32_parameters)
        for name, module in network.named_modules():
            if keep_in_fp32(name, module):
                module.register_forward_pre_hook(_cast_inputs_to_fp32, with_kwargs=True)
                module.register_forward_hook(self._cast_outputs)
                self._fp32_names |= {f"{name}.{inner}" if name else inner for inner, _ in _tensors(module)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        dtype = self.compute_dtype
        in_fp32 = self._fp32_names | {name for name, _ in self.network.named_buffers()} if self._promote_dtypes else self._fp32_names
        tensors = {name: _cast(tensor, torch.float32 if name in in_fp32 else dtype) for name, tensor in _tensors(self.network)}
        args, kwargs = tree_map(lambda value: value if _is_per_sample(value) else _cast(value, dtype), (args, kwargs))
        with PromoteDtypes() if self._promote_dtypes else nullcontext():
            output = functional_call(self.network, tensors, args, kwargs)
        return tree_map(lambda value: _cast(value, torch.float32), output)

    def _cast_outputs(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        return tree_map(lambda value: _cast(value, self.compute_dtype), output)


def _cast_inputs_to_fp32(_module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
    return tree_map(lambda value: _cast(value, torch.float32), (args, dict(kwargs)))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def _is_per_sample(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim <= 1


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
