"""The models that are compared: how large they are, and what memory they need. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

GB = 10**9


@dataclass(frozen=True)
class Size:
    """One model."""

    title: str
    """As tables say it."""
    family: str
    """How it is read: the keys of ``scm_export.families.FAMILIES``."""
    parameters: int
    """About so many."""
    trial: bool = True
    """Whether opening it several times, to find a peer's best settings, is cheap."""
    cpu_batch_sizes: tuple[int, ...] = (1, 8)
    """Measured on a CPU with ``--all``."""

    @property
    def weights_bytes(self) -> int:
        """Of the weights in float32."""
        return 4 * self.parameters


SIZES: dict[str, Size] = {
    "digits": Size("digits 28x28", "edm2", 1_600_000),
    "XXS": Size("EDM2-XXS 32x32x4", "edm2", 31_300_000),
    "S": Size("EDM2-S 64x64x4", "edm2", 280_200_000, trial=False),
    "XXL": Size("EDM2-XXL 64x64x4", "edm2", 1_523_000_000, trial=False, cpu_batch_sizes=(1,)),
    "SANA-Sprint": Size("small SANA-Sprint 32x32x32", "sana-sprint", 33_000_000),
    "CM": Size("small consistency model 32x32", "consistency", 14_000_000),
    "LCM": Size("small latent consistency model 32x32x4", "latent-consistency", 10_000_000),
}

# Memory beside the weights: Python, libraries, feature maps.
BASE_BYTES = 1_200_000_000
# While a checkpoint is exported the weights are in memory once, and then some (results/export.json).
EXPORT_WEIGHTS = 1.5
# On disk: the checkpoint, the bundle, and the plain export.
DISK_WEIGHTS = 3.2


def available_bytes() -> int | None:
    """Memory that processes can still have; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def lacking(need: float, what: str, available: int | None) -> str | None:
    """Why something does not fit into the memory there is, or None."""
    if available is None or need <= available:
        return None
    return f"{what} needs about {need / GB:.1f} GB of memory, and {available / GB:.1f} GB are available: close other programs, or leave it out"


def preparing_bytes(size: Size) -> float:
    """Memory that making a size's models takes at its peak."""
    return EXPORT_WEIGHTS * size.weights_bytes + BASE_BYTES
