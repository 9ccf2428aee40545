"""The tiles of the CUDA convolution: which shapes and tiles are measured, and the table that the library is built with. No GPU is used."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # the scripts import one another from there

import _common
import autotune
from _autotune.table import FOLDER, Row, family, read_rows, tiles, updated
from _autotune.timing import model, node_count
from _paper.layers import Operation
from _paper.own import TILES

from scm_runtime.devices.placement import Placement

HARDWARE = "NVIDIA H200 9.0, ONNX Runtime 1.31.1"
PLACEMENT = Placement("cuda:0", (("CUDAExecutionProvider", {}),), "", "NVIDIA H200 9.0")


def test_the_table_is_the_same_whatever_the_order_of_the_measurements() -> None:
    rows = [Row(90, 64, 1792, 1792, 9, 8, "mma_64x64", "mma_128x64"), Row(90, 4096, 448, 448, 9, 1, "mma_128x128", "mma_128x128")]
    text = updated("", rows, HARDWARE)
    assert text == updated(updated("", rows[1:], HARDWARE), rows[:1], HARDWARE) == updated(text, reversed(rows), HARDWARE)
    assert f"measured on {HARDWARE}.\n" in text
    assert text.splitlines()[-2:] == [
        "SCM_TILE(90, 64, 1792, 1792, 9, 8, mma_64x64, mma_128x64)",
        "SCM_TILE(90, 4096, 448, 448, 9, 1, mma_128x128, mma_128x128)",
    ]
    other = updated(text, [Row(80, 64, 1792, 1792, 9, 2, "mma_64x64", "mma_64x64")], "NVIDIA A100 8.0")
    assert len(read_rows(other)) == 3
    assert f"measured on NVIDIA A100 8.0; {HARDWARE}.\n" in other


def test_the_table_and_the_paper_model_know_the_librarys_tiles() -> None:
    numbers = tiles((FOLDER / "op.h").read_text())
    assert list(numbers.values()) == list(range(len(numbers)))
    assert [tile.name for tile in TILES] == list(numbers)
    text = (FOLDER / "tiles.inc").read_text()
    assert updated(text, [], None) == text


LAYER = Operation("convolution", "conv_res0", 8, 64, 1792, 1792, 9, "modulate")


def test_the_fastest_tiles_of_the_family_and_split_that_suit_both_batches_are_taken() -> None:
    alone = {"mma_64x64 / 8": 30.0, "mma_64x32 / 8": 25.0, "wgmma_64x64 / 4": 22.0, "mma_64x32 / 4": 20.0}
    many = {"mma_64x64 / 8": 90.0, "mma_64x32 / 8": 99.0, "wgmma_64x64 / 4": 300.0, "mma_128x64 / 2": 10.0}
    assert autotune.row(LAYER, {"1": alone, "8": many}, 90) == Row(90, 64, 1792, 1792, 9, 8, "mma_64x32", "mma_64x64")


def test_a_row_has_tiles_of_one_family() -> None:
    with pytest.raises(ValueError, match="both tiles must be of one family"):
        read_rows("SCM_TILE(90, 64, 1792, 1792, 9, 8, mma_64x64, wgmma_64x64)\n")


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[int, int] | None]]:
    """Batches and tiles that ``autotune`` measures, without a GPU: large tiles are the fastest in large batches, and small ones alone."""
    calls: list[tuple[int, tuple[int, int] | None]] = []

    def time(_: Operation, samples: int, __: float, ___: object, tile: tuple[int, int] | None) -> float:
        calls.append((samples, tile))
        return 1e-3 if tile is None else (50e-6 + 1e-6 * tile[0] if samples == 1 else 400e-6 - 1e-6 * tile[0])

    native = SimpleNamespace(info=SimpleNamespace(cuda=True), path=tmp_path)
    monkeypatch.setattr(autotune, "seconds", time)
    monkeypatch.setattr(autotune, "resolve_device", lambda _: PLACEMENT)
    monkeypatch.setattr(autotune, "find_library", lambda: native)
    monkeypatch.setattr(autotune, "shapes", lambda _: [LAYER])
    monkeypatch.setattr(_common, "RESULTS", tmp_path)
    return calls


def test_all_tiles_of_the_chosen_family_are_measured_in_both_batches(measured: list[Any], tmp_path: Path) -> None:
    table = tmp_path / "tiles.inc"
    done = CliRunner(catch_exceptions=False).invoke(autotune.main, ["--table", str(table)])
    assert done.exit_code == 0, done.output
    (found,) = read_rows(table.read_text())
    names = list(tiles((FOLDER / "op.h").read_text()))
    chosen = [name for name in names if family(name) == family(found.tile)]
    assert (found.tile, found.tile_of_many) == (chosen[0], chosen[-1])
    assert {(n, (names.index(name), found.split)) for n in (1, 8) for name in chosen} <= set(measured)
    assert "our kernel is faster than cuDNN or cuBLAS for 1." in done.output


def test_shapes_are_measured_again_only_if_the_kernels_have_changed(measured: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--table", str(tmp_path / "tiles.inc")]
    for expected in (True, False):
        measured.clear()
        CliRunner(catch_exceptions=False).invoke(autotune.main, arguments)
        assert bool(measured) is expected
    monkeypatch.setattr(autotune, "sources_hash", lambda: "other kernels")
    CliRunner(catch_exceptions=False).invoke(autotune.main, arguments)
    assert measured


def test_each_shape_is_measured_once_with_what_follows_it() -> None:
    found = autotune.shapes(["XXL"])
    keys = [(one.taps, one.pixels, one.inputs, one.outputs) for one in found]
    assert len(set(keys)) == len(keys)
    assert [one.follower for one in found if (one.taps, one.pixels, one.inputs, one.outputs) == (9, 4096, 448, 448)] == ["modulate"]
    assert all(one.kind == "convolution" or one.follower == "mp_sum" for one in found), "cuBLAS computes other products"
    assert all(one.inputs % 8 == one.outputs % 8 == 0 for one in found), "there is one kernel for others"


def test_the_timed_graph_reads_more_weights_than_a_cache_holds() -> None:
    one = Operation("convolution", "conv_res0", 8, 64, 512, 512, 9)
    count = node_count(one, 20e-6)
    assert count * one.weight_bytes > 60e6
    made = model(one, 2, 3)
    assert [node.op_type for node in made.graph.node] == ["Conv3x3"] * 3
    assert len({value.raw_data for value in made.graph.initializer}) == 3
