"""Autoguidance (arXiv 2406.02507): guidance of a network by a weaker version of itself, as one network."""

from __future__ import annotations

from torch import Tensor, nn

from scm_export.networks.edm2 import UNet


class Autoguided(nn.Module):
    """``F = F_guide + guidance_scale (F_network - F_guide)`` (arXiv 2406.02507, equation 3). A scale of 1 gives the network without guidance.

    The guide may be smaller, trained for fewer steps, or unconditional.
    """

    def __init__(self, network: UNet, guide: UNet) -> None:
        super().__init__()
        self.network, self.guide = network, guide

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None, guidance_scale: Tensor | None = None) -> Tensor:
        """Evaluate F. The arguments are those of :meth:`UNet.forward`; ``guidance_scale``, float32 ``[N]``, is required."""
        assert guidance_scale is not None
        good: Tensor = self.network(x, c_noise, class_labels)
        worse: Tensor = self.guide(x, c_noise, class_labels if self.guide.config.label_dim else None)
        return worse + guidance_scale.reshape(-1, 1, 1, 1) * (good - worse)
