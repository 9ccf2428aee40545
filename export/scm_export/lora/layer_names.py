"""Names of a network's layers in LoRA files: those of diffusers and transformers, also with underscores, and those of Stable Diffusion's original code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from torch import nn

# Layers of a ResnetBlock2D, by their names in diffusers and in Stable Diffusion's original code, which kohya uses for SDXL.
RESNET = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection"}
OUTER = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
}

_PROJECTION = re.compile(r"_(q|k|v|out)_proj$")
_BLOCK = re.compile(r"(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_(.+)")
_MIDDLE = re.compile(r"mid_block_(resnets|attentions)_(\d+)_(.+)")


class LayerNames:
    """The layers of a network that a LoRA can change, by every name that they have in files."""

    def __init__(self, network: nn.Module) -> None:
        self._layers: dict[str, tuple[str, nn.Linear | nn.Conv2d]] = {}
        config: Any = getattr(network, "config", None)
        layers_per_block = getattr(config, "layers_per_block", None)
        with_attention = {name.rpartition(".attentions")[0] for name, module in network.named_modules() if name.endswith(".attentions")}
        blocks_with_attention = {canonical(name) for name in with_attention}
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                for alias in _aliases(canonical(name), layers_per_block, blocks_with_attention):
                    self._layers.setdefault(alias, (name, module))

    def find(self, name: str) -> tuple[str, nn.Linear | nn.Conv2d] | None:
        """Return a layer and its name in the network, by its name in a file; None if there is no such layer."""
        return self._layers.get(canonical(name))

    def nearest(self, name: str) -> str:
        """Return the name in the network that is most like a name in a file; "" if the network has no layers."""
        nearest = get_close_matches(canonical(name), self._layers, n=1, cutoff=0)
        return self._layers[nearest[0]][0] if nearest else ""


def canonical(name: str) -> str:
    """Return a layer's name with underscores, as kohya writes it, without parts that only some versions of diffusers and transformers have."""
    return name.replace(".processor.", ".").replace(".", "_").removeprefix("text_model_")


def _aliases(name: str, layers_per_block: object, blocks_with_attention: set[str]) -> Iterator[str]:
    """All names of a layer, given its canonical name."""
    yield name
    if name.endswith("_to_out_0"):  # diffusers' attention processors had to_out_lora
        yield name.removesuffix("_0")
    if _PROJECTION.search(name):  # and the same names in text encoders
        yield _PROJECTION.sub(r"_to_\1", name)
    if isinstance(layers_per_block, int) and (original := _original_name(name, layers_per_block, blocks_with_attention)) is not None:
        yield original


def _original_name(name: str, layers_per_block: int, blocks_with_attention: set[str]) -> str | None:
    """Return the name of a U-Net's layer in Stable Diffusion's original code; None if it has none.

    There, the blocks of all levels have one list: ``input_blocks`` on the way down, where a level has ``layers_per_block`` blocks and one that
    downsamples, and ``output_blocks`` on the way up, where a level has one block more, and the last of them upsamples.
    """
    if name in OUTER:
        return OUTER[name]
    per_level = layers_per_block + 1
    if middle := _MIDDLE.fullmatch(name):
        kind, index, layer = middle[1], int(middle[2]), middle[3]
        return f"middle_block_{2 * index if kind == 'resnets' else 2 * index + 1}_{RESNET.get(layer, layer)}"
    if (block := _BLOCK.fullmatch(name)) is None:
        return None
    way, level, kind, index, layer = block[1], int(block[2]), block[3], int(block[4]), block[5]
    if kind == "downsamplers":
        return f"input_blocks_{(level + 1) * per_level}_0_op" if layer == "conv" else None
    if kind == "upsamplers":
        inner = 2 if f"up_blocks_{level}" in blocks_with_attention else 1
        return f"output_blocks_{level * per_level + layers_per_block}_{inner}_{layer}"
    number = level * per_level + index + (way == "down")
    return f"{'input' if way == 'down' else 'output'}_blocks_{number}_{0 if kind == 'resnets' else 1}_{RESNET.get(layer, layer)}"
