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
    r0, r1, _, _ = philox((zero + draw, zero, element & LOW32, element >> 32), key0, key1)
    u = r0.float() * 2.0**-32 + 2.0**-33
    v = r1.float() * (2 * math.pi * 2.0**-32) + 2 * math.pi * 2.0**-33
    u, v = u.double(), v.double()  # so that the last bit does not depend on an element's place in the batch
    return ((-2 * u.log()).sqrt() * v.sin()).float().reshape(len(seeds), *shape)


def philox(counter: tuple[Tensor, ...], key0: Tensor, key1: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words of counter and two of key, each in an int64 tensor, to four random words."""
    c0, c1, c2, c3 = counter
    for i in range(ROUNDS):
        # The 64-bit product wraps to the bits wanted; an arithmetic shift needs its sign bits masked off.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (product1 >> 32 & LOW32) ^ c1 ^ (key0 + i * WEYL[0] & LOW32)
        c2 = (product0 >> 32 & LOW32) ^ c3 ^ (key1 + i * WEYL[1] & LOW32)
        c1, c3 = product1 & LOW32, product0 & LOW32
    return c0, c1, c2, c3
