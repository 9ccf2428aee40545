"""``PhiloxNormal``: counter-based normal noise by Philox4x32-10 (Salmon et al., SC 2011) and the Box-Muller transform, as in cuRAND and torch.randn on CUDA.

Element e of draw d for a seed has the counter (d, 0, e low, e high) and the key (seed low, seed high), 32 bits each. The first two of the four result words
give u = r0 / 2^32 + 2^-33, v = 2 pi (r1 / 2^32 + 2^-33) and z = sqrt(-2 ln u) sin v. Each value depends only on (seed, draw, element).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scm_export.ops.operator import Operator

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW32 = 0xFFFFFFFF


def philox_normal(seeds: Tensor, draw: int, shape: Sequence[int], scale: float = 1.0) -> Tensor:
    """Generate normal noise with standard deviation ``scale``. This function is never traced: bundles have a separate graph with this operator.

    Args:
        seeds: int64 ``[N]``, any value.
        draw: index of the draw, in [0, 2^32).
        shape: shape of one sample.
        scale: standard deviation of the noise.

    Returns:
        float32 ``[N, *shape]``.
    """
    element = torch.arange(math.prod(shape), dtype=torch.int64, device=seeds.device)[None, :]
    key0, key1 = (seeds & LOW32)[:, None], (seeds >> 32 & LOW32)[:, None]
    zero = torch.zeros_like(element)
    r0, r1, _, _ = philox((zero + draw, zero, element & LOW32, element >> 32), key0, key1)
    u = r0.float() * 2.0**-32 + 2.0**-33
    v = r1.float() * (2 * math.pi * 2.0**-32) + 2 * math.pi * 2.0**-33
    u, v = u.double(), v.double()  # so that the last bit does not depend on the position in the batch
    return ((-2 * u.log()).sqrt() * v.sin()).float().reshape(len(seeds), *shape) * scale


def philox(counter: tuple[Tensor, ...], key0: Tensor, key1: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10: convert a counter of four 32-bit words and a key of two, all in int64 tensors, to four random words."""
    c0, c1, c2, c3 = counter
    for i in range(ROUNDS):
        # The wrapped 64-bit product has the required bits; the sign bits of the arithmetic shift are masked off.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (product1 >> 32 & LOW32) ^ c1 ^ (key0 + i * WEYL[0] & LOW32)
        c2 = (product0 >> 32 & LOW32) ^ c3 ^ (key1 + i * WEYL[1] & LOW32)
        c1, c3 = product1 & LOW32, product0 & LOW32
    return c0, c1, c2, c3


def _high(word: str, result: str) -> str:
    """Statements for bits 32 to 63 of a word. ONNX shifts need unsigned integers; the other operators need signed ones."""
    return f"""
        {result}_unsigned = Cast <to = 13> ({word})
        {result}_shifted = BitShift <direction = "RIGHT"> ({result}_unsigned, thirty_two)
        {result} = Cast <to = 7> ({result}_shifted)
    """


def _round(i: int) -> str:
    """Statements for round i of :func:`philox`, from the words ``r<i>_<word>`` to ``r<i+1>_<word>``."""
    old, new = f"r{i}", f"r{i + 1}"
    return f"""
        {new}_weyl0 = Constant <value_int = {i * WEYL[0] & LOW32}> ()
        {new}_weyl1 = Constant <value_int = {i * WEYL[1] & LOW32}> ()
        {new}_sum0 = Add (key0, {new}_weyl0)
        {new}_sum1 = Add (key1, {new}_weyl1)
        {new}_key0 = BitwiseAnd ({new}_sum0, low32)
        {new}_key1 = BitwiseAnd ({new}_sum1, low32)
        {new}_product0 = Mul ({old}_0, multiplier0)
        {new}_product1 = Mul ({old}_2, multiplier1)
        {_high(f"{new}_product1", f"{new}_high1")}
        {_high(f"{new}_product0", f"{new}_high0")}
        {new}_mixed0 = BitwiseXor ({new}_high1, {old}_1)
        {new}_mixed1 = BitwiseXor ({new}_high0, {old}_3)
        {new}_0 = BitwiseXor ({new}_mixed0, {new}_key0)
        {new}_1 = BitwiseAnd ({new}_product1, low32)
        {new}_2 = BitwiseXor ({new}_mixed1, {new}_key1)
        {new}_3 = BitwiseAnd ({new}_product0, low32)
    """


def _uniform(word: str, result: str, unit: float) -> str:
    """Statements that convert a word to a float64 value in (0, unit), computed in float32."""
    return f"""
        {result}_word = Cast <to = 1> ({word})
        {result}_unit = Constant <value_float = {unit * 2.0**-32!r}> ()
        {result}_half = Constant <value_float = {unit * 2.0**-33!r}> ()
        {result}_scaled = Mul ({result}_word, {result}_unit)
        {result}_float = Add ({result}_scaled, {result}_half)
        {result} = Cast <to = 11> ({result}_float)
    """


PHILOX_NORMAL = Operator(
    name="PhiloxNormal",
    inputs={"seeds": "int64", "draw": "int64", "scale": "float"},
    attributes=("shape",),
    output="noise",
    output_type="float",
    # The same algorithm as philox_normal(); words are int64. The key has the shape [N, 1, ...], the counter [1, *shape].
    body=f"""
        low32 = Constant <value_int = {LOW32}> ()
        thirty_two_signed = Constant <value_int = 32> ()
        thirty_two = Cast <to = 13> (thirty_two_signed)
        multiplier0 = Constant <value_int = {MULTIPLIERS[0]}> ()
        multiplier1 = Constant <value_int = {MULTIPLIERS[1]}> ()
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        first = Constant <value_ints = [0]> ()
        one_sample = Constant <value_ints = [1]> ()

        shape = Constant <value_ints: ints = @shape> ()
        zeros = Mul (shape, zero)
        ones = Add (zeros, one)
        column_shape = Concat <axis = 0> (first, ones)
        column = Reshape (seeds, column_shape)
        key0 = BitwiseAnd (column, low32)
        {_high("column", "key1")}
        size = ReduceProd <keepdims = 0> (shape)
        elements = Range (zero, size, one)
        row_shape = Concat <axis = 0> (one_sample, shape)
        row = Reshape <allowzero = 1> (elements, row_shape)
        r0_0 = Unsqueeze (draw, first)
        r0_1 = Constant <value_ints = [0]> ()
        r0_2 = BitwiseAnd (row, low32)
        {_high("row", "r0_3")}
        {"".join(map(_round, range(ROUNDS)))}

        {_uniform("r10_0", "u", 1.0)}
        {_uniform("r10_1", "v", 2 * math.pi)}
        minus_two_float = Constant <value_float = -2.0> ()
        minus_two = Cast <to = 11> (minus_two_float)
        log = Log (u)
        square = Mul (log, minus_two)
        radius = Sqrt (square)
        sin = Sin (v)
        z_double = Mul (radius, sin)
        z = Cast <to = 1> (z_double)
        noise = Mul (z, scale)
    """,
)
