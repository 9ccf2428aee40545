"""The result of ``scm-runtime bench``: its types define the JSON document. Also reading, writing and comparing of results.

Some fields are named otherwise in the document, whose keys must not change: ``field(name=…)``.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct, field

from scm_runtime.bundle.manifest import Count
from scm_runtime.common.documents import read_json
from scm_runtime.common.files import beside, output_errors, output_file
from scm_runtime.common.message_text import first_line, printable
from scm_runtime.errors import InvalidArgumentError

FORMAT: Literal["scm-runtime bench"] = "scm-runtime bench"
VERSION = 1
UNSET = {"sampler": "the bundle's default", "threads": "one per core"}
COMPARED = ("median_ms", "p95_ms", "min_ms", "images_per_second")


class Cell(Struct, frozen=True, kw_only=True):
    """The figures for one number of steps and one batch size; None if the cell failed or was not reached."""

    steps: Count
    batch_size: Count
    runs: int = 0
    """Number of measured calls."""
    evaluations: int | None = None
    """Number of evaluations of the step graph per call."""
    first_ms: float | None = None
    """The first call, which allocates memory. It is not one of the runs."""
    median_ms: float | None = None
    p95_ms: float | None = None
    min_ms: float | None = None
    images_per_second: float | None = None
    """``batch_size`` divided by the median time."""
    parts_ms: dict[str, float] = {}
    """Medians of ``noise``, ``steps``, ``decode`` and ``copy``."""
    gflops: float | None = None
    """10^9 floating point operations per second. See ``ModelCost``."""
    matmul_share: float | None = field(default=None, name="product_share")
    """``gflops`` as a share of ``MachinePeak.matmul_gflops``."""
    weights_gb_per_second: float | None = None
    """10^9 bytes of weights per second, if an evaluation reads each weight once: the minimum of memory traffic."""
    copy_share: float | None = None
    """``weights_gb_per_second`` as a share of ``MachinePeak.copy_gb_per_second``."""
    error: str | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Steps and batch size, which identify a cell within a result."""
        return self.steps, self.batch_size


class ModelCost(Struct, frozen=True, kw_only=True):
    """Cost of a sample, on any machine: two operations per multiplication with addition, of convolutions and matrix products only."""

    step_gflop: float | None = None
    """10^9 operations of one evaluation of the step graph."""
    decode_gflop: float | None = None
    uncounted: tuple[str, ...] = ()
    """Operators in the graphs that were not counted: they multiply matrices, but their shapes do not tell the number of operations."""
    weight_bytes: int = 0
    """Size of the parameters in the dtype of the graphs. An evaluation reads them once, for any batch size."""
    reason: str | None = None
    """Why nothing was counted."""


class MachinePeak(Struct, frozen=True, kw_only=True):
    """The machine's peak in large matrix products and in copying, measured in the same run."""

    matmul_gflops: float | None = field(default=None, name="product_gflops")
    copy_gb_per_second: float | None = None
    """10^9 bytes read and written per second."""
    how: str = ""
    """How it was measured."""
    reason: str | None = None
    """Why it was not measured."""


class Memory(Struct, frozen=True, kw_only=True):
    """Memory in bytes; None if the system does not report it."""

    process_opened: int | None = None
    """Resident memory after the bundle was opened, before the first call."""
    process_peak: Count | None = None
    """Highest resident memory until the last cell was measured."""
    device_peak: int | None = None
    """Largest growth of the GPU's used memory since before the bundle was opened, by all processes."""


class BundleFacts(Struct, frozen=True, kw_only=True):
    """Identifies the measured bundle."""

    name: str
    sha256: str
    """SHA-256 of its manifest, which has the checksums of all its files."""
    family: str
    parameters: int


class Comparison(Struct, frozen=True, kw_only=True):
    """Comparison of a result with an earlier one."""

    file: str
    date: str
    differences: tuple[str, ...]
    """What differs besides the figures, in words."""
    ratios: tuple[dict[str, float | int], ...]
    """For each cell in both results: ``steps``, ``batch_size``, and this result's figures divided by the other's, by name."""
    process_peak: float | None = None

    def of(self, cell: Cell) -> dict[str, float | int]:
        """Ratios of a cell; empty if the other result does not have it."""
        return next((row for row in self.ratios if (row["steps"], row["batch_size"]) == cell.key), {})


class Result(Struct, frozen=True, kw_only=True):
    """The whole result."""

    format: Literal["scm-runtime bench"] = FORMAT
    version: int = VERSION
    date: str
    bundle: BundleFacts
    device: str
    hardware: str
    """Name of the CPU or GPU."""
    provider: str
    dtype: str
    native_ops: str | None
    """Version of the native library, or None if function bodies ran."""
    cuda_graph: bool
    threads: int | None
    """Number of threads that was set; None for one per core."""
    cores: int
    """Number of cores that the process may use."""
    versions: dict[str, str]
    sampler: str | None
    seconds: float | None
    """Time to measure each cell; None if it is unlimited."""
    open_ms: float
    interrupted: bool
    cells: tuple[Cell, ...]
    memory: Memory
    work: ModelCost
    peak: MachinePeak
    comparison: Comparison | None = None

    @property
    def works(self) -> bool:
        """True if at least one cell was measured."""
        return any(cell.median_ms is not None for cell in self.cells)

    def to_json(self) -> bytes:
        """The JSON document that ``scm-runtime bench --json`` prints."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)


def read_result(path: Path) -> Result:
    """Read a file that ``scm-runtime bench`` wrote; raises InvalidArgumentError if it is not one."""
    expected = "Expected a file written by scm-runtime bench … -o FILE, or what its --json printed."
    try:
        raw = read_json(path)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise InvalidArgumentError(f"'{path}' is JSON, but not the result of a benchmark. {expected}")
        if (version := raw.get("version")) != VERSION:
            raise InvalidArgumentError(f"'{path}' has version {printable(version)} of the format, this scm-runtime reads version {VERSION}. Measure again.")
        return msgspec.convert(raw, Result)
    except OSError as error:
        raise InvalidArgumentError(f"cannot read '{path}': {error.strerror or error}. {expected}") from error
    except ValueError as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(f"'{path}' is not the result of a benchmark: {first_line(error)}. {expected}") from error


def check_writable(path: Path) -> None:
    """Raise OutputError if a result cannot be written to a path."""
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = beside(path, "trial")
        trial.touch()
        trial.unlink()


def write_result(result: Result, path: Path) -> None:
    """Write the JSON document. If that fails, an earlier file is kept, and OutputError is raised."""
    with output_errors(path), output_file(path) as part:
        part.write_bytes(result.to_json() + b"\n")


def check_comparable(other: Result, path: Path, keys: Collection[tuple[int, int]]) -> None:
    """Raise InvalidArgumentError if the other result has figures for none of the cells ``keys``."""
    there = {cell.key for cell in other.cells if cell.median_ms is not None}
    if not there & set(keys):
        listed = ", ".join(f"{steps} with {batch_size}" for steps, batch_size in sorted(there)) or "none"
        raise InvalidArgumentError(
            f"'{path}' has no figures for any of the requested steps and batch sizes. It has (steps with batch size): {listed}. "
            "Select those with --steps and --batch-sizes, or leave --compare out."
        )


def compare(this: Result, other: Result, path: Path) -> Comparison:
    """Divide a result's figures by those of another."""
    before = {cell.key: cell for cell in other.cells}
    rows: list[dict[str, float | int]] = []
    for cell in this.cells:
        if (old := before.get(cell.key)) is None or old.median_ms is None or cell.median_ms is None:
            continue
        rows.append({"steps": cell.steps, "batch_size": cell.batch_size, **{name: ratio for name in COMPARED if (ratio := _ratio(cell, old, name))}})
    return Comparison(
        file=str(path),
        date=other.date,
        differences=tuple(_differences(this, other)),
        ratios=tuple(rows),
        process_peak=_ratio(this.memory, other.memory, "process_peak"),
    )


def _ratio(this: Struct, other: Struct, name: str) -> float | None:
    new, old = getattr(this, name), getattr(other, name)
    return new / old if new and old else None


def _differences(this: Result, other: Result) -> list[str]:
    """Describe differences, beginning with the bundle: with another bundle, ratios mean something else."""
    found = []
    if this.bundle.sha256 != other.bundle.sha256:
        same_name = this.bundle.name == other.bundle.name
        what = f"{this.bundle.name!r} with other files" if same_name else f"{other.bundle.name!r} there, {this.bundle.name!r} here"
        found.append(f"another bundle: {what}")
    for name in ("sampler", "device", "hardware", "provider", "dtype", "native_ops", "cuda_graph", "threads", "cores"):
        old, new = getattr(other, name), getattr(this, name)
        if old != new:
            found.append(f"{name.replace('_', ' ')}: {_shown(old, name)} there, {_shown(new, name)} here")
    for name in sorted(this.versions.keys() | other.versions.keys()):
        old, new = other.versions.get(name), this.versions.get(name)
        if old != new:
            found.append(f"{name}: {_shown(old)} there, {_shown(new)} here")
    return found


def _shown(value: object, name: str = "") -> str:
    return UNSET.get(name, "none") if value is None else str(value)
