"""A prepared model for all peers: its formats on disk, noise, conditioning, and the reference result.

Workers of runtimes without PyTorch import this module too, so it needs only NumPy.
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
"""Samples a batch once, from given noise to the final state, float32 ``[N, *sample]`` on the host."""

LATENTS = ("sana-sprint", "latent-consistency")  # families that are measured without their decoder, which is the same for all peers
WITHOUT_DOUBLE = "fp32.without-double"  # a form of the plain export
FACTS, INPUTS, REFERENCE = "case.json", "inputs.npz", "reference.npy"


@dataclass(frozen=True)
class Facts:
    """Content of ``case.json``: parameters of the model that the sampling loop needs."""

    size: str
    family: str
    checkpoint: str
    """Name of the file or folder of the checkpoint."""
    times: list[float]
    """Times of the steps, with the end time last."""
    initial_scale: float
    sigma_data: float
    seeds: list[int]
    parameters: int
    flop: float
    """Operations per sample in all steps: matrix products and convolutions; a multiply-add counts as two."""
    made_with: str = ""
    """Sources and packages that it was made with."""


@dataclass(frozen=True)
class Case:
    """A prepared model in its folder."""

    folder: Path
    facts: Facts

    @staticmethod
    def load(folder: Path) -> Case:
        """Read a case that ``prepare`` wrote."""
        return Case(folder, Facts(**json.loads((folder / FACTS).read_text())))

    def save(self) -> None:
        """Write ``case.json``. It is written last, so that its presence means that the case is complete."""
        (self.folder / FACTS).write_text(json.dumps(asdict(self.facts), indent=2) + "\n")

    @property
    def checkpoint(self) -> Path:
        return self.folder / self.facts.checkpoint

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle.scm"

    def plain(self, dtype: str) -> Path:
        """Return the path of the step graph as torch.onnx.export writes it, without scm operators."""
        return self.folder / "plain" / f"step.{dtype}.onnx"

    def noises(self, n: int) -> list[NDArray[np.float32]]:
        """Return the noise of the first n samples: draws 0, 1, …"""
        with np.load(self.folder / INPUTS) as file:
            return [file[f"noise_{k}"][:n].copy() for k in range(len(self.facts.times))]

    def conditioning(self, n: int) -> dict[str, NDArray[Any]]:
        """Return the conditioning of the first n samples, by the names of the model's inputs."""
        with np.load(self.folder / INPUTS) as file:
            return {name: file[name][:n].copy() for name in file.files if not name.startswith("noise_")}

    def pairs(self) -> list[tuple[float, float]]:
        """Return time and next time of each step."""
        return list(pairwise(self.facts.times))

    def error(self, found: NDArray[np.float32]) -> float:
        """Return the error relative to PyTorch in float32: root mean square of the difference divided by that of the reference."""
        expected = np.load(self.folder / REFERENCE)[: len(found)].astype(np.float64)
        if found.shape != expected.shape or not np.isfinite(found).all():
            return float("inf")
        return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))
