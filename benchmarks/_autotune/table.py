"""The table of measured shapes, cpp_ops/src/convolution/tiles.inc: which kernel, tile and split a convolution or product gets."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "cpp_ops" / "src" / "convolution"
TABLE = FOLDER / "tiles.inc"

HEADER = """\
// The measured choice of the convolution's kernel by shape, one line a shape:
//   SCM_TILE(capability, pixels of a sample, in, out, taps, own, split, tile for 1 to 3 samples, tile for more)
// `own` is false where cuDNN or cuBLAS was faster; nothing reads it yet. The tiles are those of op.h. Shapes that are not listed are estimated (choice.cc).
// Written by benchmarks/autotune.py; measured on {hardware}.
"""
NOTHING = "nothing yet"
MEASURED = re.compile(r"measured on (.*)\.$", re.MULTILINE)
ROW = re.compile(r"^SCM_TILE\((\d+), (\d+), (\d+), (\d+), (\d+), (true|false), (\d+), (\w+), (\w+)\)$", re.MULTILINE)


@dataclass(frozen=True, order=True)
class Row:
    """A line of the table."""

    capability: int
    pixels: int
    inputs: int
    outputs: int
    taps: int
    own: bool
    split: int
    tile: str
    """Name of the tile in op.h for 1 to 3 samples."""
    tile_of_many: str
    """The same for more samples."""

    @property
    def shape(self) -> tuple[int, ...]:
        """What the row is looked up by."""
        return astuple(self)[:5]

    def line(self) -> str:
        """Return the line."""
        fields = (str(value).lower() if isinstance(value, bool) else str(value) for value in astuple(self))
        return f"SCM_TILE({', '.join(fields)})\n"


def read_rows(text: str) -> list[Row]:
    """Return the rows of a table."""
    rows = []
    for capability, pixels, inputs, outputs, taps, own, split, tile, tile_of_many in ROW.findall(text):
        rows.append(Row(int(capability), int(pixels), int(inputs), int(outputs), int(taps), own == "true", int(split), tile, tile_of_many))
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
