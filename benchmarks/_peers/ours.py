"""scm_runtime: the public Generator, which also draws the noise of the later steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from _peers.case import Case, Draw

ARGUMENTS = ("class_labels", "guidance_scale", "prompt_embeds", "prompt_attention_mask")


def open_generator(case: Case, n: int, threads: int, device: str, **options: Any) -> Draw:
    """Open a Generator. ``options`` are passed to it."""
    from scm_runtime import Generator

    generate = Generator(case.bundle, device=device, threads=threads if device == "cpu" else None, **options)
    given = arguments(case, n)

    def draw() -> NDArray[np.float32]:
        array: NDArray[np.float32] = generate(**given).array
        return array

    return draw


def arguments(case: Case, n: int) -> dict[str, Any]:
    """Return the arguments of a Generator's call."""
    steps = len(case.facts.times) - 1
    given: dict[str, Any] = {"seed": case.facts.seeds[:n], "latents": case.noises(n)[0], "num_inference_steps": steps, "output_type": "latent"}
    for name, value in case.conditioning(n).items():
        if name in ARGUMENTS:
            given[name] = value.tolist() if value.ndim == 1 else value
        else:
            given.setdefault("conditioning", {})[name] = value
    return given
