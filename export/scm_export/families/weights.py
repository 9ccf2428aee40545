"""Loads a checkpoint's tensors into a network on the meta device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scm_export.checkpoints.state_dict import drop_bookkeeping, strip_prefixes
from scm_export.checkpoints.tensor_dict import is_finite
from scm_export.errors import CheckpointError
from scm_runtime.common.message_text import printable

MAX_SHARING = 8  # tied weights: how often one storage may occur


def load_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load exactly these tensors into the network as float32, and empty the dict.

    A float32 tensor is used without a copy, and the network may then change it in place. If it is in a memory-mapped file, changed pages are
    copied on write and the file stays unchanged. Other tensors are converted and freed one at a time.

    Raises:
        CheckpointError: names or shapes differ, or a weight is not finite; the message lists the first three names of each kind.
    """
    own = network.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    drop_bookkeeping(weights, expected)
    strip_prefixes(weights, expected)
    problems = []
    if missing := [name for name in expected if name not in weights]:
        problems.append(_first_three("missing", missing))
    if unexpected := [name for name in weights if name not in expected]:
        problems.append(_first_three("not in the network", unexpected))
    shapes = [
        f"{name} must have {list(shape)}, got {list(weights[name].shape)}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if shapes:
        problems.append(_first_three("wrong shape", shapes))
    if problems:
        raise CheckpointError("the weights do not match the config: " + "; ".join(problems))
    if strange := [f"{name} ({weights[name].dtype})" for name in expected if own[name].is_floating_point() and not weights[name].is_floating_point()]:
        raise CheckpointError(_first_three("weights must be of a floating dtype, got", strange))
    _check_overlap(weights)
    owned, storages = {}, set[int]()
    for name in expected:
        tensor = weights.pop(name)
        dtype = torch.float32 if own[name].is_floating_point() else own[name].dtype  # counters and indices
        owned[name] = tensor if _is_plain(tensor, storages) else tensor.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        storages.add(tensor.untyped_storage().data_ptr())
    if broken := [name for name, tensor in owned.items() if not is_finite(tensor)]:
        raise CheckpointError(_first_three("weights must be finite, got NaN or infinity in", broken))
    network.load_state_dict(owned, assign=True)


def _check_overlap(weights: dict[str, Tensor]) -> None:
    """Check that tensors do not share memory so much that their copies would be far larger than the file. Raises CheckpointError."""
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in weights.values()}
    if (size := sum(tensor.nbytes for tensor in weights.values())) > MAX_SHARING * sum(stored.values()) + (1 << 20):
        raise CheckpointError(f"the weights share memory: {size} bytes of tensors in {sum(stored.values())} bytes of storage. Save them as separate tensors.")


def _is_plain(tensor: Tensor, storages: set[int]) -> bool:
    """Return True if a tensor can become a parameter without a copy. Tensors that share memory cannot, since each is scaled in place later."""
    storage = tensor.untyped_storage()
    whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
    return whole and tensor.dtype == torch.float32 and tensor.device.type == "cpu" and storage.data_ptr() not in storages


def _first_three(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}: {', '.join(map(printable, names[:3]))}{more}"
