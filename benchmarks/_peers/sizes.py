"""The models that are compared: size and memory. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

GB = 10**9


@dataclass(frozen=True)
class Size:
    """A model of the comparison."""

    title: str
    """Name in tables."""
    family: str
    """A key of ``scm_export.families.FAMILIES``."""
    parameters: int
    """Approximate number of parameters."""
    trial: bool = True
    """Whether variants of a peer are tried. False for models that are expensive to open."""
    cpu_batch_sizes: tuple[int, ...] = (1, 8)
    """Batch sizes on a CPU with ``--all``."""

    @property
    def weights_bytes(self) -> int:
        """Size of the weights in float32."""
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

# Memory in addition to the weights: Python, libraries, feature maps.
BASE_BYTES = 1_200_000_000
# Peak memory of an export as a multiple of the weights (results/intel-amx/export.json).
EXPORT_WEIGHTS = 1.5
# Disk space as a multiple of the weights: the checkpoint, the bundle, and the plain export.
DISK_WEIGHTS = 3.2


def available_bytes() -> int | None:
    """Return the available memory; None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def memory_shortage(need: float, what: str, available: int | None) -> str | None:
    """Return why something does not fit into the available memory, or None."""
    if available is None or need <= available:
        return None
    return f"{what} needs about {need / GB:.1f} GB of memory, and {available / GB:.1f} GB are available: close other programs, or leave it out"


def preparing_bytes(size: Size) -> float:
    """Return the peak memory of preparing the models of a size."""
    return EXPORT_WEIGHTS * size.weights_bytes + BASE_BYTES
