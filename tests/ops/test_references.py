"""The PyTorch references, compared with torch's functions and with the properties stated in the papers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from scm_export import ops
from scm_export.ops.philox_normal import philox


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pixel_norm_is_torch_rms_norm(dtype: torch.dtype) -> None:
    x = (randn(2, 5, 7, 24) * 3).to(dtype)
    tolerance = 5e-4 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(ops.pixel_norm(x), functional.rms_norm(x, (24,)), rtol=tolerance, atol=tolerance)


def test_pixel_norm_survives_zeros_and_half_precision_overflow() -> None:
    assert torch.isfinite(ops.pixel_norm(torch.zeros(1, 1, 1, 8))).all()
    assert torch.isfinite(ops.pixel_norm(torch.full((1, 1, 1, 512), 6e4, dtype=torch.float16))).all()


def test_magnitudes_are_preserved() -> None:
    a, b = randn(4, 16, 16, 48), torch.randn(4, 16, 16, 96, generator=torch.Generator().manual_seed(1))
    assert ops.mp_silu(a).square().mean().sqrt() == pytest.approx(1, abs=0.01)
    assert ops.mp_sum(a, b[..., :48], t=0.3).square().mean().sqrt() == pytest.approx(1, abs=0.01)
    joined = ops.mp_cat(a, b, t=0.5)
    assert joined.square().mean().sqrt() == pytest.approx(1, abs=0.01)
    assert joined[..., :48].square().sum() == pytest.approx(float(joined[..., 48:].square().sum()), rel=0.05)


def test_mp_sum_clips() -> None:
    assert ops.mp_sum(torch.tensor([1e4]), torch.tensor([1e4]), t=0.5, clip=256.0).item() == 256.0


def test_cosine_attention_is_torch_attention_of_normalised_heads() -> None:
    heads, d = 3, 8
    qkv = randn(2, 10, 3 * heads * d)
    q, k, v = (functional.rms_norm(x, (d,)).transpose(1, 2) for x in qkv.reshape(2, 10, 3, heads, d).unbind(2))
    expected = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 10, heads * d)
    torch.testing.assert_close(ops.cosine_attention(qkv, heads), expected, rtol=1e-3, atol=1e-3)


def test_consistency_step_to_the_end_denoises_and_to_its_own_time_along_the_truth_stays() -> None:
    x0, z, noise = randn(3, 1, 4, 4), torch.ones(3, 1, 4, 4), randn(3, 1, 4, 4) * 2
    sigma_data, t = 0.5, torch.tensor([0.2, 1.1, 1.5])
    cos, sin = t.cos().reshape(3, 1, 1, 1), t.sin().reshape(3, 1, 1, 1)
    x = cos * x0 + sin * sigma_data * z
    F = (cos * sigma_data * z - sin * x0) / sigma_data
    torch.testing.assert_close(ops.consistency_step(x, F, noise, t, torch.zeros(3), sigma_data), x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ops.consistency_step(x, F, z, t, t, sigma_data), x, atol=1e-5, rtol=1e-5)


def test_to_image_rounds_half_to_even_and_clamps() -> None:
    x = torch.tensor([-3.0, 0.5, 1.5, 2.5, 254.5, 300.0]).reshape(1, 1, 1, 6)
    assert ops.to_image(x, scale=1.0, offset=0.0).flatten().tolist() == [0, 0, 2, 2, 254, 255]


# Known answers of Philox4x32-10 from the Random123 library: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    words = philox(tuple(torch.tensor([c]) for c in counter), torch.tensor([key[0]]), torch.tensor([key[1]]))
    assert tuple(int(word) for word in words) == expected


def test_noise_is_standard_normal_and_its_draws_and_seeds_are_independent() -> None:
    n = 100_000
    rows = torch.cat([ops.philox_normal(torch.tensor([0, 1, -5, 2**62]), draw, (n,)) for draw in (0, 1)])
    error = 4 / math.sqrt(n)
    assert rows.mean(1).abs().max() < error
    assert (rows.std(1) - 1).abs().max() < error
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 1.5 * error
    assert (rows.pow(4).mean(1) - 3).abs().max() < 15 * error
