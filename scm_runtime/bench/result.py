"""What ``scm-runtime bench`` found: the JSON document, and how two of them compare."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from scm_runtime.common.files import beside, whole_file
from scm_runtime.errors import InvalidArgumentError, OutputError

FORMAT: Literal["scm-runtime bench"] = "scm-runtime bench"
VERSION = 1
LARGEST_BYTES = 16 << 20  # of a file to compare with: a mistaken path may be one of weights
UNSET = {"sampler": "the bundle's own", "threads": "one a core"}
FIGURES = ("median_ms", "p95_ms", "min_ms", "images_per_second")  # that are compared


class Cell(Struct, frozen=True, kw_only=True):
    """The figures of one number of steps and one batch size; None where it failed or was not reached."""

    steps: int
    batch_size: int
    runs: int = 0
    """Calls that the figures are of."""
    evaluations: int | None = None
    """Of the step graph, in a call."""
    first_ms: float | None = None
    """The first call, which takes memory; it is not among the runs."""
    median_ms: float | None = None
    p95_ms: float | None = None
    min_ms: float | None = None
    images_per_second: float | None = None
    """batch_size by the median."""
    parts_ms: dict[str, float] = {}
    """Medians of ``noise``, ``steps``, ``decode`` and ``copy``."""
    gflops: float | None = None
    """10^9 floating point operations a second, see ``ModelCost``."""
    product_share: float | None = None
    """Of ``MachinePeak.product_gflops``."""
    weights_gb_per_second: float | None = None
    """10^9 bytes of weights a second, each read once an evaluation: the least that must be moved."""
    copy_share: float | None = None
    """Of ``MachinePeak.copy_gb_per_second``."""
    error: str | None = None

    @property
    def key(self) -> tuple[int, int]:
        """What names it in a run."""
        return self.steps, self.batch_size


class ModelCost(Struct, frozen=True, kw_only=True):
    """What a sample takes, whatever the machine: two operations for each multiplication with addition in convolutions and matrix products, nothing else."""

    step_gflop: float | None = None
    """Of one evaluation."""
    decode_gflop: float | None = None
    uncounted: tuple[str, ...] = ()
    """Operators in the graphs that multiply matrices too, and whose shapes alone do not tell how much."""
    weight_bytes: int = 0
    """Of the parameters in the dtype that computes; an evaluation of any batch size reads them once."""
    reason: str | None = None
    """Why nothing was counted."""


class MachinePeak(Struct, frozen=True, kw_only=True):
    """What the machine reaches in a large matrix product and in copying, measured in the same run."""

    product_gflops: float | None = None
    copy_gb_per_second: float | None = None
    """Bytes read and bytes written."""
    how: str = ""
    reason: str | None = None
    """Why it is not known."""


class Memory(Struct, frozen=True, kw_only=True):
    """Bytes; None where the system does not say."""

    process_opened: int | None = None
    """Resident after the bundle was opened, before the first call."""
    process_peak: int | None = None
    """The most that was resident, until the last cell was measured."""
    device_peak: int | None = None
    """By how much more of the GPU's memory was taken than before the bundle was opened, at most, whoever took it."""


class BundleFacts(Struct, frozen=True, kw_only=True):
    """Which bundle it was."""

    name: str
    sha256: str
    """Of its manifest, which has the sums of all its files."""
    family: str
    parameters: int


class Comparison(Struct, frozen=True, kw_only=True):
    """This run beside another's file."""

    file: str
    date: str
    differences: tuple[str, ...]
    """What else than the time was not the same, in words."""
    ratios: tuple[dict[str, float | int], ...]
    """For each cell in both: ``steps``, ``batch_size`` and, by the name of the figure, this run's divided by the other's."""
    process_peak: float | None = None

    def of(self, cell: Cell) -> dict[str, float | int]:
        """The ratios of a cell; empty where the other has none."""
        return next((row for row in self.ratios if (row["steps"], row["batch_size"]) == cell.key), {})


class Result(Struct, frozen=True, kw_only=True):
    """All of it, as ``scm-runtime bench --json`` prints it."""

    format: Literal["scm-runtime bench"] = FORMAT
    version: int = VERSION
    date: str
    bundle: BundleFacts
    device: str
    hardware: str
    """The processor's name, or the GPU's."""
    provider: str
    dtype: str
    native_ops: str | None
    """Version of the library whose kernels ran; None: the function bodies did."""
    cuda_graph: bool
    threads: int | None
    """As asked for; None: one a core."""
    cores: int
    """That the process may use."""
    versions: dict[str, str]
    sampler: str | None
    seconds: float | None
    """Asked for, a cell; None for no end."""
    open_ms: float
    interrupted: bool
    cells: tuple[Cell, ...]
    memory: Memory
    work: ModelCost
    peak: MachinePeak
    comparison: Comparison | None = None

    @property
    def works(self) -> bool:
        """Whether any cell has figures."""
        return any(cell.median_ms is not None for cell in self.cells)

    def to_json(self) -> bytes:
        """The document."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)


def read_result(path: Path) -> Result:
    """A file of ``scm-runtime bench``; raises InvalidArgumentError where it is none."""
    wanted = "Expected a file written by scm-runtime bench … -o FILE, or what its --json printed."
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise InvalidArgumentError(f"'{path}' is too large to be a result, {path.stat().st_size:,} bytes. {wanted}")
        raw: Any = msgspec.json.decode(path.read_bytes())
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise InvalidArgumentError(f"'{path}' is JSON, but no result of a benchmark. {wanted}")
        if raw.get("version") != VERSION:
            raise InvalidArgumentError(f"'{path}' has version {raw.get('version')!r} of the format, this scm-runtime reads version {VERSION}. Measure again.")
        return msgspec.convert(raw, Result)
    except OSError as error:
        raise InvalidArgumentError(f"cannot read '{path}': {error.strerror or error}. {wanted}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"'{path}' is no result of a benchmark: {error}. {wanted}") from error


def check_writable(path: Path) -> None:
    """Raise OutputError if a result could not be written there."""
    with _written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = beside(path, "trial")
        trial.touch()
        trial.unlink()


def write_result(result: Result, path: Path) -> None:
    """Write the document; an earlier file is left as it was where that fails. Raises OutputError."""
    with _written(path), whole_file(path) as part:
        part.write_bytes(result.to_json() + b"\n")


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write '{path}': {reason}. Choose a folder that you may write to, on a disk with room.") from error


def check_comparable(other: Result, path: Path, keys: Collection[tuple[int, int]]) -> None:
    """Raise InvalidArgumentError if there is nothing to compare: no cell of the other's has a figure for one of these."""
    there = {cell.key for cell in other.cells if cell.median_ms is not None}
    if not there & set(keys):
        listed = ", ".join(f"{steps} with {batch_size}" for steps, batch_size in sorted(there)) or "none at all"
        raise InvalidArgumentError(
            f"'{path}' has no figures for any of the steps and batch sizes asked for, but for (steps with batch size): {listed}. "
            "Ask for those by --steps and --batch-sizes, or leave --compare out."
        )


def compare(this: Result, other: Result, path: Path) -> Comparison:
    """This run's figures divided by another's."""
    before = {cell.key: cell for cell in other.cells}
    rows: list[dict[str, float | int]] = []
    for cell in this.cells:
        if (old := before.get(cell.key)) is None or old.median_ms is None or cell.median_ms is None:
            continue
        rows.append({"steps": cell.steps, "batch_size": cell.batch_size, **{name: ratio for name in FIGURES if (ratio := _ratio(cell, old, name))}})
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
    """The bundle first, as it makes all the rest mean something else."""
    found = []
    if this.bundle.sha256 != other.bundle.sha256:
        same_name = this.bundle.name == other.bundle.name
        what = f"{this.bundle.name!r} of other files" if same_name else f"{other.bundle.name!r} there, {this.bundle.name!r} here"
        found.append(f"another bundle: {what}")
    for name in ("sampler", "device", "hardware", "provider", "dtype", "native_ops", "cuda_graph", "threads", "cores"):
        old, new = getattr(other, name), getattr(this, name)
        if old != new:
            found.append(f"{name.replace('_', ' ')}: {_said(old, name)} there, {_said(new, name)} here")
    for name in sorted(this.versions.keys() | other.versions.keys()):
        old, new = other.versions.get(name), this.versions.get(name)
        if old != new:
            found.append(f"{name}: {_said(old)} there, {_said(new)} here")
    return found


def _said(value: object, name: str = "") -> str:
    return UNSET.get(name, "none") if value is None else str(value)
