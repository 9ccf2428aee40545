"""Adds LoRA to the weights of a network: ``W += scale * (alpha / rank) * up @ down``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from scm_export.checkpoints.tensor_dict import is_finite
from scm_export.errors import CheckpointError
from scm_export.lora.keys import DENOISER, Component
from scm_export.lora.layer_names import LayerNames
from scm_export.lora.reading import Lora, LowRank
from scm_runtime.common.message_text import printable


@torch.no_grad()
def merge_loras(loras: Sequence[Lora], network: nn.Module, component: Component = DENOISER) -> None:
    """Add the layers that the files have for one component to a network's weights, in place and in the order given.

    Args:
        loras: open files, whose ``merged`` gets the component. A file without layers for it is skipped.
        network: an instance of the class of diffusers or transformers, with its weights on the CPU in float32.
        component: which network of a pipeline it is.

    Raises:
        CheckpointError: a layer of a file is not in the network or has another shape, or a weight would become infinite.
    """
    names = LayerNames(network) if any(component in lora.layers for lora in loras) else None
    for lora in loras:
        if names is None or component not in lora.layers:
            continue
        found = _match(lora, lora.layers[component], names)
        for layer, change in found:
            delta = change.up.flatten(1).float() @ change.down.flatten(1).float()
            layer.weight.data.add_(delta.reshape(layer.weight.shape), alpha=lora.source.scale * change.factor)
            if not is_finite(layer.weight.data):
                raise CheckpointError(
                    f"{lora.describe()} at the scale {lora.source.scale:g} makes weights infinite: the first is that of '{printable(change.key)}'. "
                    "Choose a smaller scale."
                )
        lora.merged.add(component)


def _match(lora: Lora, changes: dict[str, LowRank], names: LayerNames) -> list[tuple[nn.Linear | nn.Conv2d, LowRank]]:
    """Return each change with its layer. Raises CheckpointError if one does not fit."""
    found = {name: names.find(name) for name in changes}
    if lost := [name for name, layer in found.items() if layer is None]:
        nearest = f"; the nearest layer of the network is '{near}'" if (near := names.nearest(lost[0])) else ""
        if len(lost) == len(changes):
            raise CheckpointError(
                f"{lora.describe()} is for another model: none of its {len(lost)} layers is in the network. The first is "
                f"'{printable(changes[lost[0]].key)}'{nearest}. Give a LoRA that was trained on this kind of model."
            )
        raise CheckpointError(
            f"the key '{printable(changes[lost[0]].key)}' of {lora.describe()} fits no layer{nearest}. "
            f"{len(lost)} of its {len(changes)} layers fit none. Give a LoRA that was trained on this kind of model."
        )
    matched, changed = [], dict[str, str]()
    for name, change in changes.items():
        entry = found[name]
        assert entry is not None
        own, layer = entry
        if own in changed:
            raise CheckpointError(
                f"{lora.describe()} changes the layer '{own}' twice, by '{printable(changed[own])}' and '{printable(change.key)}'. Remove one of them."
            )
        changed[own] = change.key
        _check_shape(lora, change, own, layer)
        matched.append((layer, change))
    return matched


def _check_shape(lora: Lora, change: LowRank, name: str, layer: nn.Linear | nn.Conv2d) -> None:
    shape = list(layer.weight.shape)
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        raise CheckpointError(f"the key '{printable(change.key)}' of {lora.describe()} changes '{name}', a convolution in groups: that is not supported.")
    own = [change.up.shape[0], *change.down.shape[1:]]
    if _without_unit_kernel(own) != _without_unit_kernel(shape):
        raise CheckpointError(
            f"the key '{printable(change.key)}' of {lora.describe()} is for a weight of {own}, and '{name}' of the network has {shape}. "
            "Give a LoRA that was trained on this kind of model."
        )


def _without_unit_kernel(shape: list[int]) -> list[int]:
    """Shape of a weight, with a convolution of 1x1 as a matrix: files have either for the projections of transformer blocks."""
    return shape[:2] if shape[2:] == [1, 1] else shape
