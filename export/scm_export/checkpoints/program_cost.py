"""What a program would compute and allocate, estimated from the shapes of its tensors before anything runs.

A few kilobytes of program can ask for hours of matrix products or terabytes of memory. Here it runs on tensors without data (torch's FakeTensorMode),
where each operator only determines the shape of its result.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode, UnsupportedOperatorException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from scm_export.checkpoints.torch_file import TRUST_HINT
from scm_export.errors import CheckpointError

aten = torch.ops.aten

# Limits of one evaluation. For a sample of 1024x1024 pixels, SDXL needs 7.3 TFLOP of the 5 100 that are allowed, FLUX with 12 billion parameters 78 of 23 800.
FLOP_PER_SAMPLE, FLOP_PER_WEIGHT = 5e12, 2e6  # the second for each sample: a weight used once at every pixel of 1024x1024
BYTES_PER_SAMPLE, BYTES_PER_WEIGHT = 2 << 30, 256
FLOP_PER_ELEMENT = 32  # of an elementwise operator: it is limited by memory, and takes the time of so many operations of a matrix product
MAX_PIECES = 4096  # results of one operator
MAX_INNER_CALLS = 20_000  # operators that one operator consists of


ATTENTION = (aten._scaled_dot_product_flash_attention_for_cpu.default,)  # without random numbers unless its fourth argument, the dropout, is above 0


class _RefusedError(Exception):
    """The message says what is wrong with an operator: "would change a weight"."""


class Limits(NamedTuple):
    """Limits of one evaluation."""

    flop: float
    bytes: float


def limits(samples: int, weights: int) -> Limits:
    """Limits for a batch and a network with so many weights."""
    return Limits(samples * (FLOP_PER_SAMPLE + weights * FLOP_PER_WEIGHT), samples * BYTES_PER_SAMPLE + weights * BYTES_PER_WEIGHT)


class CostMeter(TorchDispatchMode):
    """Adds up arithmetic and memory of the operators that run on tensors without data. The first one beyond a limit raises an exception."""

    def __init__(self, limit: Limits, read_only: Mapping[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation for it
        self.limit, self.flop, self.bytes = limit, 0.0, 0
        storages = [tensor.untyped_storage() for tensor in tree_leaves(read_only) if isinstance(tensor, Tensor)]
        self._read_only = {storage._cdata: storage for storage in storages}  # by address, which stays theirs while they are held
        self._operator, self._inner_calls = "", 0

    def start_operator(self, name: str) -> None:
        """Begin the next operator of the program."""
        self._operator, self._inner_calls = name, 0

    def error(self, what: str) -> CheckpointError:
        """Error about the current operator."""
        return CheckpointError(f"the operator {self._operator} {what}. {TRUST_HINT}")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        self._inner_calls += 1
        if self._inner_calls > MAX_INNER_CALLS:
            raise _RefusedError(f"consists of more than {MAX_INNER_CALLS} others")
        if func in PIECES and (count := PIECES[func](*args, **kwargs)) > MAX_PIECES:
            raise _RefusedError(f"has {count} results, at most {MAX_PIECES} are allowed")
        if torch.Tag.nondeterministic_seeded in func.tags and not (func in ATTENTION and (args[3] if len(args) > 3 else 0) == 0):
            raise _RefusedError("draws random numbers. Call .eval() on the network and export it again")
        self._check_writes(func, args)
        result = func(*args, **kwargs)
        if func.namespace == "aten" and not func.is_view:
            self._add(func, args, kwargs, result)
        return result

    def _check_writes(self, func: Any, args: tuple[Any, ...]) -> None:
        for parameter, value in zip(func._schema.arguments, args, strict=False):
            writes = parameter.alias_info is not None and parameter.alias_info.is_write
            if writes and isinstance(value, Tensor) and value.untyped_storage()._cdata in self._read_only:
                raise _RefusedError("would change an input or a weight of the network in place")

    def _add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given, made = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in ((args, kwargs), result))
        formula = FLOP.get(func._overloadpacket)
        self.flop += FLOP_PER_ELEMENT * sum(tensor.numel() for tensor in (*given, *made))
        self.flop += formula(*args, **kwargs, out_val=result) if formula else 0
        if self.flop > self.limit.flop:
            raise _RefusedError(f"would bring one evaluation to {self.flop / 1e12:,.3g} TFLOP, at most {self.limit.flop / 1e12:,.3g} are allowed")
        # An operator may copy an expanded operand.
        workspace = sum(max(0, tensor.numel() * tensor.itemsize - tensor.untyped_storage().nbytes()) for tensor in given)
        if func._overloadpacket in WORKSPACES:
            workspace += WORKSPACES[func._overloadpacket](*args, out=result)
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                known.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._release, storage.nbytes()).atexit = False
        if (total := self.bytes + workspace) > self.limit.bytes:
            raise _RefusedError(f"would bring one evaluation to {total / 2**30:,.3g} GiB of memory, at most {self.limit.bytes / 2**30:,.3g} are allowed")

    def _release(self, count: int) -> None:
        self.bytes -= count


@contextmanager
def without_data(values: dict[int, Any], weights: int, samples: int) -> Iterator[tuple[dict[int, Any], CostMeter]]:
    """Yield the values with tensors that have a shape and no data, and the meter under which operators run on them.

    Raises:
        CheckpointError: an operator is beyond the limits, draws random numbers, changes a given tensor, or has a shape that cannot be known.
    """
    mode = FakeTensorMode(allow_fallback_kernels=False)  # a fallback would run the real operator
    shapes = {value_id: mode.from_tensor(value) if isinstance(value, Tensor) else value for value_id, value in values.items()}
    meter = CostMeter(limits(samples, weights), shapes)
    torch_log = logging.getLogger("torch._subclasses.fake_tensor")
    level = torch_log.level
    torch_log.setLevel(logging.CRITICAL)  # it logs tracebacks of the errors that it raises
    try:
        with torch.no_grad(), mode, meter:
            yield shapes, meter
    except _RefusedError as error:
        raise meter.error(str(error)) from error
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise meter.error("has a result whose size depends on data") from error
    except UnsupportedOperatorException as error:
        raise meter.error("has a result whose size torch cannot determine") from error
    finally:
        torch_log.setLevel(level)


# ----------------------------------------------------------------------------
# Operators whose arithmetic or memory is more than that of their elements.


def _count(axes: Any) -> int:
    count: int = math.prod(axes)
    return count


def _slowness(dtype: torch.dtype) -> int:
    """How many times longer a matrix product takes on a CPU than in float32."""
    if not dtype.is_floating_point:
        return 32
    return {2: 4, 4: 1}.get(dtype.itemsize, 2)


def _product_flop(formula: Callable[..., int]) -> Callable[..., int]:
    return lambda *args, out_val, **kwargs: formula(*args, out_val=out_val, **kwargs) * _slowness(_first(out_val).dtype)


def _first(result: Any) -> Tensor:
    tensor: Tensor = result if isinstance(result, Tensor) else result[0]
    return tensor


def _pool_flop(x: Tensor, kernel: list[int], *_: Any, out_val: Any, **__: Any) -> int:
    axes = 3 if x.ndim == 5 else 2
    return 8 * _first(out_val).numel() * _count(kernel if len(kernel) > 1 else kernel * axes)


def _distance_flop(x: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return FLOP_PER_ELEMENT * out_val.numel() * x.shape[-1]


def _logarithmic_flop(x: Tensor, *_: Any, **__: Any) -> int:
    return FLOP_PER_ELEMENT * x.numel() * x.numel().bit_length()


def _svd_flop(x: Tensor, *_: Any, **__: Any) -> int:
    return FLOP_PER_ELEMENT * x.numel() * min(x.shape[-2:])


def _trilinear_size(i1: Tensor, i2: Tensor, i3: Tensor, expand1: list[int], expand2: list[int], expand3: list[int], *_: Any) -> int:
    shapes = []
    for tensor, expand in ((i1, expand1), (i2, expand2), (i3, expand3)):
        for axis in expand:
            tensor = tensor.unsqueeze(axis)
        shapes.append(tensor.shape)
    return _count(torch.broadcast_shapes(*shapes))


def _convolution_columns(x: Tensor, weight: Tensor, *_: Any, out: Tensor) -> int:
    """Bytes of the matrix of patches that torch makes for a convolution in float64 or of integers."""
    if x.dtype.is_floating_point and x.itemsize <= 4:
        return 0
    return _count(weight.shape[1:]) * _count((x.shape[0], *max(x.shape[2:], out.shape[2:], key=_count))) * x.itemsize


POOLS = (aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, aten.avg_pool2d, aten.avg_pool3d)
LOGARITHMIC = (aten.sort, aten.topk, aten._fft_c2c, aten._fft_c2r, aten._fft_r2c)

FLOP: dict[Any, Callable[..., int]] = {
    **{packet: _product_flop(formula) for packet, formula in flop_registry.items()},
    **dict.fromkeys(POOLS, _pool_flop),
    **dict.fromkeys(LOGARITHMIC, _logarithmic_flop),
    aten._scaled_dot_product_flash_attention_for_cpu: _product_flop(lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape)),
    aten.addbmm: _product_flop(lambda x, a, b, *_, **__: 2 * a.numel() * b.shape[-1]),
    aten._cdist_forward: _distance_flop,
    aten._linalg_svd: _svd_flop,
    aten._trilinear: lambda *args, **_: FLOP_PER_ELEMENT * _trilinear_size(*args),
}
"""Arithmetic of an operator in addition to that of its elements."""

WORKSPACES: dict[Any, Callable[..., int]] = {
    aten.convolution: _convolution_columns,
    aten._trilinear: lambda *args, out: _trilinear_size(*args) * out.itemsize,
}
"""Bytes that an operator needs while it runs."""


def _split_count(x: Tensor, size: int, dim: int = 0) -> int:
    return -(-x.shape[dim] // size) if size > 0 else 0


PIECES: dict[Any, Callable[..., int]] = {
    aten.unbind.int: lambda x, dim=0: x.shape[dim],
    aten.split.Tensor: _split_count,
    aten.unsafe_split.Tensor: _split_count,
}
"""Numbers of results of operators that return lists."""
