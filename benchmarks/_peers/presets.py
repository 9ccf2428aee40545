"""Selections of models and peers that the tables of docs/benchmarks.md are measured with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """What is measured, and for how long."""

    sizes: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    seconds: float
    """Duration of the rounds of one size and batch size."""
    min_rounds: int
    """Minimum number of rounds, however long they take."""
    cell_s: float
    """Limit of one peer with one size and batch size, its start included."""
    minutes: float
    """No further size, batch size or group of peers is started after this time."""


PRESETS = {
    "short": Preset(("digits", "XXS", "CM", "LCM", "SANA-Sprint"), (1, 8), seconds=5, min_rounds=2, cell_s=150, minutes=20),
    "large": Preset(("S", "XXL"), (1, 8), seconds=20, min_rounds=2, cell_s=420, minutes=120),
}
