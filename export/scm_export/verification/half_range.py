"""Finds the networks between latents and images whose activations overflow float16, such as SDXL's autoencoder, before graphs are made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from scm_export import ops
from scm_export.model import ImageNetwork, Model

FLOAT16_MAX = torch.finfo(torch.float16).max
MARGIN = 2  # other latents reach larger values than the few that are measured
WRAPPERS = "network.network."  # of the modules that convert and cast around a network
REMEDY = "An autoencoder made for float16, such as madebyollin/sdxl-vae-fp16-fix in place of SDXL's, is faster: give it with"


class Peak:
    """The largest absolute output of a network's modules so far."""

    def __init__(self) -> None:
        self.value, self.layer, self.calls = 0.0, "", 0

    @property
    def overflows(self) -> bool:
        """True if float16 does not hold the value and a margin."""
        return not self.value * MARGIN <= FLOAT16_MAX

    def update(self, layer: str, output: object) -> None:
        """Take the floating-point tensors of a module's output into account."""
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                largest = max(abs(float(extreme)) for extreme in value.aminmax())
                if not largest <= self.value and not math.isnan(self.value):
                    self.value, self.layer = largest, layer


@contextmanager
def fitting_float16(model: Model) -> Iterator[None]:
    """Measure the image networks of a model that is exported in fp16 while they run in the block, in float32.

    At the end of the block, a network that was not run is run on noise of the variance of latents. Those that float16 does not hold are added to
    ``model.fp32_networks``, each with a note that names the layer.
    """
    parts = {"decoder": model.decoder, "encoder": model.encoder, "preview decoder": model.preview}
    networks = {name: part for name, part in parts.items() if isinstance(part, ImageNetwork)}
    peaks = {name: Peak() for name in networks}
    with ExitStack() as stack:
        for name, part in networks.items():
            stack.enter_context(_measured(part.network, peaks[name]))
        yield
        for name, part in networks.items():
            if not peaks[name].calls:
                _run(model, part, name)
    for name, part in networks.items():
        if (peak := peaks[name]).overflows:
            model.fp32_networks.append(part.network)
            option = "--preview-decoder" if part is model.preview else "--decoder"
            reached = f"the output of its layer '{peak.layer}' reaches {peak.value:.3g}, and float16 ends at {FLOAT16_MAX:.0f}, of which half is a margin"
            model.notes += (f"the {name} computes in float32 in the graphs in fp16, too: {reached}. {REMEDY} {option}",)


@contextmanager
def _measured(network: nn.Module, peak: Peak) -> Iterator[None]:
    def called(_module: nn.Module, _args: Any, _output: object) -> None:
        peak.calls += 1

    def hook(layer: str) -> Any:
        return lambda _module, _args, output: peak.update(layer, output)

    with ExitStack() as stack:
        stack.callback(network.register_forward_hook(called).remove)
        for name, module in network.named_modules():
            if layer := name.removeprefix(WRAPPERS):
                stack.callback(module.register_forward_hook(hook(layer)).remove)
        yield


@torch.no_grad()
def _run(model: Model, part: ImageNetwork, name: str) -> None:
    model.compute_in("fp32")
    if name == "encoder":
        part.network(torch.randint(256, (1, *part.shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8))
    else:
        part.network(ops.philox_normal(torch.zeros(1, dtype=torch.int64), 0, model.sample_shape) * model.sigma_data)
