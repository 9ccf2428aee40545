"""Type promotion in half precision: everything that torch.autocast accepts is accepted, and computed with the same precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from scm_export.precision import Precision
from scm_export.promotion import PromoteDtypes

WIDE, HALF = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0)), torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(1)).half()
WEIGHT = torch.randn(6, 6, generator=torch.Generator().manual_seed(2)).half()

# A call with operands of different dtypes, and the dtype of its result.
CALLS: dict[str, tuple[Callable[[], Tensor], torch.dtype]] = {
    "a wide input and a half weight": (lambda: functional.linear(WIDE.flatten(2).mT, WEIGHT), torch.float16),
    "the weight by name": (lambda: functional.linear(input=WIDE.flatten(2).mT, weight=WEIGHT), torch.float16),
    "a half input and a wide weight": (lambda: functional.linear(HALF.flatten(2).mT, WEIGHT.float()), torch.float32),
    "an operator by name": (lambda: torch.ops.aten.linear.default(WIDE.flatten(2).mT, WEIGHT), torch.float16),
    "convolution": (lambda: functional.conv2d(WIDE, WEIGHT[..., None, None]), torch.float16),
    "product": (lambda: WIDE @ HALF, torch.float16),
    "einsum": (lambda: torch.einsum("nchw,nchv->nwv", WIDE, HALF), torch.float16),
    "attention": (lambda: functional.scaled_dot_product_attention(WIDE, HALF, WIDE), torch.float16),
    "sum": (lambda: WIDE + HALF, torch.float32),
    "norm": (lambda: functional.group_norm(HALF, 2, torch.ones(6), torch.zeros(6)), torch.float16),
}


@pytest.mark.parametrize(("call", "dtype"), CALLS.values(), ids=CALLS)
def test_operands_of_different_dtypes(call: Callable[[], Tensor], dtype: torch.dtype) -> None:
    with PromoteDtypes():
        assert call().dtype == dtype


def test_a_norm_does_not_overflow() -> None:
    large = HALF.clamp(-3, 3) * 20_000  # its square overflows in half precision
    with PromoteDtypes():
        found = functional.normalize(large, dim=1)
    torch.testing.assert_close(found, functional.normalize(large.float(), dim=1).half())


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_transformer_layer(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=batch_first).eval()
    network = Precision(layer, promote_dtypes=True)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layer(x)
        network.compute_dtype = torch.bfloat16
        torch.testing.assert_close(network(x), expected, rtol=0, atol=0.1)


def test_buffers_stay_float32() -> None:
    class Angles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frequencies = nn.Buffer(torch.tensor([1234.5678]))

        def forward(self, level: Tensor) -> Tensor:
            return torch.cos(input=level[:, None] * self.frequencies)

    network, level = Precision(Angles(), promote_dtypes=True), torch.tensor([0.1, 1.5])
    network.compute_dtype = torch.bfloat16
    torch.testing.assert_close(network(level), torch.cos((level[:, None] * torch.tensor([1234.5678])).double()).float(), rtol=0, atol=1e-6)
