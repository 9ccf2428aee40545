"""What every candidate is given: a model in its forms on disk, noise, conditioning, and the result to reach.

Workers of runtimes without PyTorch read it too: it needs NumPy alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Draw = Callable[[], NDArray[np.float32]]
"""Draws all samples of a batch once, from given noise to the final state, float32 ``[N, *sample]`` on the host."""

LATENTS = ("sana-sprint", "latent-consistency")  # families whose decoder is left out: it is the same for all peers
FACTS, INPUTS, REFERENCE = "case.json", "inputs.npz", "reference.npy"


@dataclass(frozen=True)
class Facts:
    """``case.json``: what the loop needs to know of the model."""

    size: str
    family: str
    checkpoint: str
    """Name of the file or folder."""
    times: list[float]
    """The end last."""
    initial_scale: float
    sigma_data: float
    seeds: list[int]
    parameters: int
    flop: float
    """Of a sample in all steps: products and convolutions, two for each multiply-add."""


@dataclass(frozen=True)
class Case:
    """A prepared model in its folder."""

    folder: Path
    facts: Facts

    @staticmethod
    def load(folder: Path) -> Case:
        """What ``prepare`` wrote."""
        return Case(folder, Facts(**json.loads((folder / FACTS).read_text())))

    def save(self) -> None:
        """Write ``case.json``, last of all: where it is, all of the case is."""
        (self.folder / FACTS).write_text(json.dumps(asdict(self.facts), indent=2) + "\n")

    @property
    def checkpoint(self) -> Path:
        return self.folder / self.facts.checkpoint

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle.scm"

    def plain(self, dtype: str) -> Path:
        """The step as torch.onnx.export writes it, without scm operators."""
        return self.folder / "plain" / f"step.{dtype}.onnx"

    def noises(self, n: int) -> list[NDArray[np.float32]]:
        """Draws 0, 1, … of the first n samples."""
        with np.load(self.folder / INPUTS) as file:
            return [file[f"noise_{k}"][:n].copy() for k in range(len(self.facts.times))]

    def conditioning(self, n: int) -> dict[str, NDArray[Any]]:
        """Of the first n samples, by the names of the model's inputs."""
        with np.load(self.folder / INPUTS) as file:
            return {name: file[name][:n].copy() for name in file.files if not name.startswith("noise_")}

    def pairs(self) -> list[tuple[float, float]]:
        """Time and next time of each step."""
        return list(pairwise(self.facts.times))

    def error(self, found: NDArray[np.float32]) -> float:
        """How far a result is from PyTorch's in float32: root mean square of the difference, as a share of that of the reference."""
        expected = np.load(self.folder / REFERENCE)[: len(found)].astype(np.float64)
        if found.shape != expected.shape or not np.isfinite(found).all():
            return float("inf")
        return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))
