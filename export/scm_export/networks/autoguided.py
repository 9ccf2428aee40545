"""Autoguidance (arXiv 2406.02507): a network led away from what a worse version of itself would do, as one network."""

from __future__ import annotations

from torch import Tensor, nn

from scm_export.networks.edm2 import UNet


class Autoguided(nn.Module):
    """``F = F_guide + guidance_scale (F_network - F_guide)`` (arXiv 2406.02507, equation 3); 1 is the network alone.

    The guide may be smaller, less trained or without classes.
    """

    def __init__(self, network: UNet, guide: UNet) -> None:
        super().__init__()
        self.network, self.guide = network, guide

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None, guidance_scale: Tensor | None = None) -> Tensor:
        """See ``UNet.forward``; ``guidance_scale`` is ``[N]``, float32."""
        assert guidance_scale is not None
        good: Tensor = self.network(x, c_noise, class_labels)
        worse: Tensor = self.guide(x, c_noise, class_labels if self.guide.config.label_dim else None)
        return worse + guidance_scale.reshape(-1, 1, 1, 1) * (good - worse)
