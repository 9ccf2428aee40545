"""What ``scm-runtime generate`` stores in the text chunks of a PNG: the prompt, and what is needed to generate the image again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scm_runtime._version import __version__
from scm_runtime.bundle.checksums import sha256
from scm_runtime.bundle.manifest import MANIFEST

if TYPE_CHECKING:
    from scm_runtime.cli.generate import GenerateOptions
    from scm_runtime.generator import Generator


class ImageMetadata:
    """Texts for the images of one command."""

    def __init__(self, generator: Generator, options: GenerateOptions) -> None:
        """Collect what is the same for all images. Raises InvalidArgumentError if the bundle does not have these steps."""
        evaluations = generator._solver_tables.evaluations(options.sampler, options.steps, options.timesteps)
        self._common = {
            "steps": str(sum(stage.weights is None for stage in evaluations)),
            **({} if options.sampler is None else {"sampler": options.sampler}),
            **({} if options.guidance_scale is None else {"guidance_scale": f"{options.guidance_scale:g}"}),
            "bundle": generator.manifest.name,
            "bundle_sha256": sha256(generator.folder / MANIFEST),
            "software": f"scm-runtime {__version__}",
        }
        self._negative = options.negative_prompt

    def of(self, seeds: Sequence[int], prompts: Sequence[str]) -> dict[str, str]:
        """Return the texts of an image with one sample or a grid of several, by keyword. ``prompts`` is empty, or has one per sample."""
        different = list(dict.fromkeys(prompts))
        texts = {} if not prompts else {"prompt": "\n".join(different if len(different) == 1 else prompts)}
        if self._negative is not None:
            texts["negative_prompt"] = self._negative
        return {**texts, "seed": ", ".join(map(str, seeds)), **self._common}
