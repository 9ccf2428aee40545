"""PyTorch: the exported network with folded weights, in eager mode and with torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from _peers.case import LATENTS, Case, Draw
from scm_export.checkpoints import load
from scm_export.families import BuildOptions, build_model
from scm_export.model import Model


def open_eager(case: Case, n: int, threads: int, device: str, *, channels_last: bool, dtype: str = "fp32") -> Draw:
    """Run the network eagerly. ``channels_last`` is the memory format of the convolutions' weights; EDM2's feature maps always have it."""
    model = _model(case, threads, device, dtype, channels_last=channels_last)
    return _loop(case, n, device, model.step)


def open_compiled(case: Case, n: int, threads: int, device: str, *, dtype: str = "fp32", channels_last: bool = False, **options: Any) -> Draw:
    """Compile the network. ``freezing`` lets the compiler reorder the weights, which PyTorch recommends on a CPU; ``mode`` is torch.compile's."""
    from torch._inductor import config

    config.freezing = bool(options.pop("freezing", False))
    model = _model(case, threads, device, dtype, channels_last=channels_last)
    return _loop(case, n, device, torch.compile(model.step, dynamic=False, **options))


def _model(case: Case, threads: int, device: str, dtype: str, *, channels_last: bool) -> Model:
    torch.set_num_threads(threads)
    model = build_model(load(case.checkpoint), BuildOptions(latents=case.facts.family in LATENTS))
    if dtype != "fp32":
        model.store_as(dtype)
    model.compute_in(dtype)
    model.step.eval().requires_grad_(False).to(device)
    if channels_last:
        model.step.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs lack this overload
    model.reference = None
    return model


def _loop(case: Case, n: int, device: str, step: Callable[..., torch.Tensor]) -> Draw:
    noises = [torch.from_numpy(noise).to(device) for noise in case.noises(n)]
    conditioning = {name: torch.from_numpy(value).to(device) for name, value in case.conditioning(n).items()}
    times = [tuple(torch.full((n,), value, dtype=torch.float32, device=device) for value in pair) for pair in case.pairs()]

    @torch.inference_mode()
    def draw() -> NDArray[np.float32]:
        x = noises[0] * case.facts.initial_scale
        for (t, t_next), noise in zip(times, noises[1:], strict=True):
            x = step(x, t, t_next, noise, conditioning)
        return x.float().cpu().numpy()

    return draw
