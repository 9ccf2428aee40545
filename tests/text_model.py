"""A tiny text-to-image sampler with every optional part: attention over masked tokens, a guidance scale, a decoder, an encoder and a preview decoder.

Height and width differ, and every input changes the output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from scm_export.model import Decoder, ImageNetwork, Latents, Model
from scm_export.ops import to_image
from scm_export.parametrisation import Step, default_times
from scm_export.precision import Precision
from scm_runtime.bundle.manifest import Conditioning

STATE = (4, 6, 8)
IMAGE = (12, 16, 3)


class Network(nn.Module):
    """``(x, t, prompt_embeds, prompt_attention_mask, guidance_scale) -> F``."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.conv_in, self.conv_out = nn.Conv2d(STATE[0], width, 3, padding=1), nn.Conv2d(width, STATE[0], 3, padding=1)
        self.norm, self.time = nn.GroupNorm(4, width), nn.Linear(2, width)
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(12, width), nn.Linear(12, width)

    def forward(self, x: Tensor, t: Tensor, prompt_embeds: Tensor, prompt_attention_mask: Tensor, guidance_scale: Tensor) -> Tensor:
        h = self.conv_in(x)
        h = h + self.time(torch.stack([t, guidance_scale], 1).to(h.dtype))[..., None, None]
        n, _, height, width = h.shape

        def split(values: Tensor) -> Tensor:
            return torch.transpose(values.unflatten(2, (self.heads, -1)), 1, 2)

        query, key, value = self.query(self.norm(h).flatten(2).transpose(1, 2)), self.key(prompt_embeds), self.value(prompt_embeds)
        mask = (prompt_attention_mask == 1)[:, None, None]
        read = functional.scaled_dot_product_attention(split(query), split(key), split(value), attn_mask=mask)
        h = h + read.transpose(1, 2).flatten(2).transpose(1, 2).reshape(n, -1, height, width)
        y: Tensor = self.conv_out(functional.silu(h))
        return y


class ToImage(nn.Module):
    """Converts latents to pixels, upsampled by ``factor``."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.network = Precision(nn.ConvTranspose2d(STATE[0], IMAGE[2], factor, stride=factor))

    def forward(self, x: Tensor) -> Tensor:
        return to_image(self.network(x), 100.0, 127.5)


class ToLatents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = Precision(nn.Conv2d(IMAGE[2], STATE[0], 2, stride=2))

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.network(image.permute(0, 3, 1, 2).float() / 127.5 - 1)
        return y


def text_model(*, latents: bool = False, extras: bool = True) -> Model:
    """Return the model, always with the same weights.

    Args:
        latents: Leave out the decoder.
        extras: Include the encoder and the preview decoder, which take time to trace.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, decoder, preview, encoder = Network(), ToImage(2), ToImage(1), ToLatents()
    decoded: Decoder = Latents() if latents else ImageNetwork(decoder.eval(), IMAGE)
    return Model(
        family="module",
        step=Step(Precision(network.eval().requires_grad_(False)), 0.5),
        sample_shape=STATE,
        sigma_data=0.5,
        initial_scale=0.5,
        times=default_times(0.5),
        decoder=decoded,
        preview=ImageNetwork(preview.eval(), (STATE[1], STATE[2], 3)) if extras else None,
        encoder=ImageNetwork(encoder.eval(), IMAGE) if extras else None,
        conditioning=(
            Conditioning(name="prompt_embeds", kind="embedding", dtype="float32", shape=("tokens", 12)),
            Conditioning(name="prompt_attention_mask", kind="mask", dtype="int64", shape=("tokens",)),
            Conditioning(name="guidance_scale", kind="scalar", dtype="float32", default=4.5),
        ),
    )
