"""Put a checkpoint's tensors into a network made on the meta device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from scm_runtime.errors import CheckpointError


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the network exactly these tensors, as float32. Memory is taken one tensor at a time.

    Raises:
        CheckpointError: names or shapes differ; the message gives the first three keys of each kind.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    problems = []
    if missing := [name for name in expected if name not in weights]:
        problems.append(_three("missing", missing))
    if unexpected := [name for name in weights if name not in expected]:
        problems.append(_three("not in the network", unexpected))
    shapes = [
        f"{name} must have {list(shape)}, got {list(weights[name].shape)}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if shapes:
        problems.append(_three("wrong shape", shapes))
    if problems:
        raise CheckpointError("the weights do not match the config: " + "; ".join(problems))
    if strange := [f"{name} ({weights[name].dtype})" for name in expected if not weights[name].is_floating_point()]:
        raise CheckpointError(_three("weights must be of a floating dtype, got", strange))
    converted = {name: weights[name].to(torch.float32, copy=True) for name in expected}
    if broken := [name for name, tensor in converted.items() if not torch.isfinite(tensor).all()]:
        raise CheckpointError(_three("weights must be finite, got NaN or infinity in", broken))
    network.load_state_dict(converted, assign=True)


def _three(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}: {', '.join(names[:3])}{more}"
