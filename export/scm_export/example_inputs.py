"""Valid example values for a model's conditioning inputs, used for tracing and verification."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scm_runtime.bundle.manifest import Conditioning

EXAMPLE_SIZE = 6  # of a dynamic dimension without a given size; tracing needs a value that no other dimension has by chance


def example_conditioning(item: Conditioning, n: int, sizes: Mapping[str, int] | None = None) -> Tensor:
    """A valid value of a conditioning input for n samples, different for each sample.

    Args:
        item: the conditioning input.
        n: number of samples.
        sizes: sizes of the dynamic dimensions by name; those that are missing get ``EXAMPLE_SIZE``.

    Returns:
        ``[n, *item.shape]``, float32 or int64 depending on ``item.kind``.
    """
    shape = [(sizes or {}).get(size, EXAMPLE_SIZE) if isinstance(size, str) else size for size in item.shape]
    match item.kind:
        case "class":
            classes = item.num_classes or 1
            return (classes - 1 - 7 * torch.arange(n)) % classes  # the last class is one of them: a network may have fewer
        case "scalar":
            return torch.linspace(1.0, 1.5, n) * (item.default or 1.0)  # a default of 0 cannot be scaled
        case "embedding":
            return torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))
        case "mask":  # each further sample has one token less
            kept = torch.arange(shape[-1]) < (shape[-1] - torch.arange(n)).clamp(min=1).reshape(-1, *(1,) * len(shape))
            return kept.expand(n, *shape).to(torch.int64)
