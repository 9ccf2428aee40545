"""Counter-based normal noise: Philox4x32-10 (Salmon et al., SC 2011) and the Box-Muller transform, as cuRAND and torch.randn on CUDA do it.

Element e of draw d for a seed: counter (d, 0, e low, e high), key (seed low, seed high), 32 bits each; of the four words r the first two
give u = r0 / 2^32 + 2^-33, v = 2 pi (r1 / 2^32 + 2^-33) and z = sqrt(-2 ln u) sin v. A number depends on (seed, draw, element) and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW32 = 0xFFFFFFFF


def philox_normal(seeds: Tensor, draw: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise.

    Args:
        seeds: int64 ``[N]``, any value.
        draw: index of the draw, in [0, 2^32).
        shape: of one sample.

    Returns:
        float32 ``[N, *shape]``.
    """
    element = torch.arange(math.prod(shape), dtype=torch.int64, device=seeds.device)[None, :]
    key0, key1 = (seeds & LOW32)[:, None], (seeds >> 32 & LOW32)[:, None]
    zero = torch.zeros_like(element)
    counter = (zero + draw, zero, element & LOW32, element >> 32)
    for i in range(ROUNDS):
        round_keys = ((key0 + i * WEYL[0]) & LOW32, (key1 + i * WEYL[1]) & LOW32)
        counter = _round(counter, round_keys)
    u = counter[0].float() * 2.0**-32 + 2.0**-33
    v = counter[1].float() * (2 * math.pi * 2.0**-32) + 2 * math.pi * 2.0**-33
    return ((-2 * u.log()).sqrt() * v.sin()).reshape(len(seeds), *shape)


def _round(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    # The 64-bit product wraps to the bits wanted; an arithmetic shift needs its sign bits masked off.
    product0, product1 = counter[0] * MULTIPLIERS[0], counter[2] * MULTIPLIERS[1]
    return (
        (product1 >> 32 & LOW32) ^ counter[1] ^ key[0],
        product1 & LOW32,
        (product0 >> 32 & LOW32) ^ counter[3] ^ key[1],
        product0 & LOW32,
    )
