"""The operations of one evaluation of an EDM2 network, in order, from the modules of the network without weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from scm_export.networks.edm2 import PRESETS, UNet, UNetConfig
from scm_export.networks.edm2_layers import MPConv

Kind = Literal["convolution", "product", "modulation", "attention", "elementwise", "resampling", "small"]
Follower = Literal["modulate", "norm_modulate", "mp_sum", ""]


@dataclass(frozen=True)
class Operation:
    """An operation on feature maps of one sample."""

    kind: Kind
    name: str
    resolution: int
    """Height of the map that it writes; 0 for embeddings."""
    pixels: int
    """Rows: height times width of the map that it writes."""
    inputs: int
    """Channels that it reads. For elementwise operations and attention: the number of elements read and written per pixel, with ``outputs`` 0."""
    outputs: int = 0
    taps: int = 1
    """Size of the filter: 9 for a 3x3 convolution."""
    follower: Follower = ""
    """The elementwise operation that follows a convolution or product. Its kernel can compute "modulate" and "mp_sum"."""

    @property
    def flop(self) -> float:
        """Floating point operations of convolutions and products; 0 for the others."""
        return 2.0 * self.pixels * self.inputs * self.outputs * self.taps

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in half precision."""
        return 2 * self.inputs * self.outputs * self.taps

    @property
    def map_bytes(self) -> int:
        """Bytes of the maps that it reads and writes, in half precision."""
        return 2 * self.pixels * (self.inputs + self.outputs)


RESOLUTION = PRESETS["XXL"].img_resolution  # of all sizes
SMALL = 19
"""Operations on [N, channels of the embedding] or on the state: time features, label, their sum, casts, padding, the consistency step."""


def operations(size: str, batch_size: int = 1, *, scm: bool = False) -> list[Operation]:
    """Return the operations of one evaluation of EDM2 at 64x64x4, in its order, for a batch; ``scm``: with sCM's double normalization."""
    config = replace(PRESETS[size], modulation="scale-shift") if scm else PRESETS[size]
    found = [operation for part in _parts(network(config)) for operation in part]
    rows = {"small": 1, "modulation": 1}
    return [replace(one, pixels=one.pixels * batch_size) if one.kind not in rows else one for one in found]


def network(config: UNetConfig) -> UNet:
    """Return a network without weights."""
    with torch.device("meta"):
        return UNet(config)


def _parts(net: UNet) -> Iterator[Iterator[Operation]]:
    first = next(iter(net.enc))
    resolution = int(first.split("x")[0])
    yield iter([_product("first convolution", resolution, net.enc[first])])
    yield (Operation("small", "embedding and state", 0, 1, 1) for _ in range(SMALL))
    for name, block in list(net.enc.items())[1:]:
        yield _block(name, block, encoder=True)
    for name, block in net.dec.items():
        yield _block(name, block, encoder=False)
    yield iter([_product("last convolution", resolution, net.out_conv)])


def _product(name: str, resolution: int, layer: Any, follower: Follower = "") -> Operation:
    assert isinstance(layer, MPConv)
    outputs, inputs, *filter_size = layer.weight.shape
    taps = filter_size[0] * filter_size[1]
    return Operation("convolution" if taps > 1 else "product", name, resolution, resolution**2, inputs, outputs, taps, follower)


def _block(name: str, block: Any, *, encoder: bool) -> Iterator[Operation]:
    resolution = int(name.split("x")[0])
    pixels = resolution**2
    outputs, inner, *_ = block.conv_res0.weight.shape

    def elementwise(what: str, elements: int, kind: Kind = "elementwise", at: int = pixels) -> Operation:
        return Operation(kind, what, resolution, at, elements)

    if encoder:
        if block.resample:
            yield elementwise("downsample", 5 * outputs, "resampling")
        if block.conv_skip is not None:
            yield _product("conv_skip", resolution, block.conv_skip)
        yield elementwise("pixel_norm_silu", 3 * outputs)
    else:
        # mp_cat_silu of the map and the skip connection, or mp_silu where there is none; before the upsampling.
        concatenates = "block" in name
        yield elementwise("mp_cat_silu" if concatenates else "mp_silu", (3 if concatenates else 2) * inner, at=pixels // 4 if block.resample else pixels)
        if block.resample:
            yield from (elementwise("upsample", 5 * inner // 4, "resampling") for _ in range(2))
    yield Operation(
        "modulation",
        "emb_linear + 1" if block.config.modulation == "scale" else "emb_linear",
        0,
        1,
        block.emb_linear.weight.shape[1],
        block.emb_linear.weight.shape[0],
    )
    yield _product("conv_res0", resolution, block.conv_res0, "modulate" if block.config.modulation == "scale" else "norm_modulate")
    if not encoder and block.conv_skip is not None:
        yield _product("conv_skip", resolution, block.conv_skip)
    yield _product("conv_res1", resolution, block.conv_res1, "mp_sum")
    if block.attn_qkv is not None:
        yield _product("attn_qkv", resolution, block.attn_qkv)
        yield elementwise("cosine_attention", 4 * outputs, "attention")
        yield _product("attn_proj", resolution, block.attn_proj, "mp_sum")
