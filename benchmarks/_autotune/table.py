"""The table of measured shapes, cpp_ops/src/convolution/tiles.inc: which tile and split a convolution or product gets."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "cpp_ops" / "src" / "convolution"
TABLE = FOLDER / "tiles.inc"

HEADER = """\
// The measured tile of the convolution by shape, one line a shape:
//   SCM_TILE(capability, pixels of a sample, in, out, taps, split, tile for 1 to 3 samples, tile for more)
// The tiles are those of op.h; both of a line are of one family. Shapes that are not listed are estimated (choice.cc).
// Written by benchmarks/autotune.py; measured on {hardware}.
"""
NOTHING = "nothing yet"
MEASURED = re.compile(r"measured on (.*)\.$", re.MULTILINE)
ROW = re.compile(r"^SCM_TILE\((\d+), (\d+), (\d+), (\d+), (\d+), (\d+), (\w+), (\w+)\)$", re.MULTILINE)


@dataclass(frozen=True, order=True)
class Row:
    """A line of the table."""

    capability: int
    pixels: int
    inputs: int
    outputs: int
    taps: int
    split: int
    tile: str
    """Name of the tile in op.h for 1 to 3 samples."""
    tile_of_many: str
    """The same for more samples."""

    def __post_init__(self) -> None:
        if family(self.tile) != family(self.tile_of_many):
            raise ValueError(f"both tiles must be of one family, or a sample's bits would depend on the batch: got {self.tile} and {self.tile_of_many}")

    @property
    def shape(self) -> tuple[int, ...]:
        """What the row is looked up by."""
        return astuple(self)[:5]

    def line(self) -> str:
        """Return the line."""
        return f"SCM_TILE({', '.join(map(str, astuple(self)))})\n"


def family(tile: str) -> str:
    """Return the family of a tile, "mma" or "wgmma": all tiles of a family give the same bits for the same split."""
    return tile.split("_")[0]


def read_rows(text: str) -> list[Row]:
    """Return the rows of a table. Raises ValueError for a row whose tiles are of two families."""
    rows = []
    for capability, pixels, inputs, outputs, taps, split, tile, tile_of_many in ROW.findall(text):
        rows.append(Row(int(capability), int(pixels), int(inputs), int(outputs), int(taps), int(split), tile, tile_of_many))
    return rows


def updated(text: str, rows: Iterable[Row], hardware: str | None) -> str:
    """Return the table with new rows, which replace older ones of the same shapes. The same rows give the same text in any order.

    ``hardware`` names where the rows were measured; None adds no name.
    """
    merged = {row.shape: row for row in (*read_rows(text), *rows)}
    known = MEASURED.search(text)
    names = {name for name in (known[1].split("; ") if known else []) if name != NOTHING} | ({hardware} if hardware else set())
    return HEADER.format(hardware="; ".join(sorted(names)) or NOTHING) + "".join(row.line() for row in sorted(merged.values()))


def tiles(header: str) -> dict[str, int]:
    """Return the numbers of the tiles by name, from the text of op.h."""
    found = re.search(r"enum class Shape : int \{(.*?)\};", header, re.DOTALL)
    assert found, "op.h has no list of shapes"
    return {name: int(number) for name, number in re.findall(r"(\w+) = (\d+)", found[1])}


def sources_hash() -> str:
    """Return a hash of what the measured times depend on: the sources of the kernels, without the choice among them."""
    digest = hashlib.sha256()
    for path in sorted([*FOLDER.glob("*"), *(FOLDER.parent / "common").glob("*.h")]):
        if path.name not in (TABLE.name, "choice.cc"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
