"""``make first-gpu``: a stage that fails, hangs or cannot run stops no other, outcomes are kept as they come, and a second call goes on. No GPU is used."""

from __future__ import annotations

import json
import subprocess
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
import first_gpu
from _autotune.table import FOLDER, Row, family, read_rows, tiles, updated
from _autotune.timing import model, node_count
from _first_gpu.report import DRY_RUN, report
from _first_gpu.runner import Outcome, run_stages
from _first_gpu.stages import Plan, Stage, stages
from _paper.layers import Operation
from _paper.own import TILES

from scm_runtime.devices.placement import Placement
from scm_runtime.ort.native_ops import LIBRARY

HARDWARE = "NVIDIA H200 9.0, ONNX Runtime 1.31.1"
PLACEMENT = Placement("cuda:0", (("CUDAExecutionProvider", {}),), "", "NVIDIA H200 9.0")


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def run(stages: list[Stage], outcomes: dict[str, Outcome] | None = None, limit_s: float = 60.0) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {} if outcomes is None else outcomes
    run_stages(stages, found, limit_s=limit_s, environment={"WORD": "from the environment"}, keep=lambda: None, say=lambda _: None)
    return found


def test_a_stage_that_fails_stops_only_those_that_need_it() -> None:
    outcomes = run(
        [
            Stage("works", (python("import os; print(os.environ['WORD'])"),), 30),
            Stage("fails", (python("print('about to fail'); raise SystemExit(3)"), python("print('not reached')")), 30),
            Stage("needs it", (python("print(1)"),), 30, needs=("fails",)),
            Stage("is missing", (["no-such-program"],), 30),
            Stage("cannot run", (python("print(1)"),), 30, unavailable="nvcc was not found"),
            Stage("skips all tests", (python("print('3 skipped')"),), 30, expects=" passed"),
            Stage("last", (python("print(2)"),), 30, needs=("works",)),
        ]
    )
    assert [outcome["status"] for outcome in outcomes.values()] == ["ok", "failed", "skipped", "failed", "skipped", "failed", "ok"]
    assert outcomes["works"]["output"] == ["from the environment"]
    assert outcomes["fails"]["output"] == ["about to fail"]
    assert outcomes["needs it"]["reason"] == "needs fails"
    assert "no-such-program" in outcomes["is missing"]["output"][0]
    assert outcomes["cannot run"]["reason"] == "nvcc was not found"
    assert outcomes["skips all tests"]["reason"] == "the output has no 'passed'"


def test_a_stage_that_hangs_is_ended_with_its_children() -> None:
    hangs = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    outcomes = run([Stage("hangs", (python(hangs),), 8), Stage("next", (python("print(1)"),), 30)])
    assert [outcome["status"] for outcome in outcomes.values()] == ["timed out", "ok"]
    (child,) = outcomes["hangs"]["output"]
    status = Path("/proc", child, "status")
    assert not status.exists() or "zombie" in status.read_text()


def test_what_does_not_fit_into_the_time_is_left_for_the_next_call(tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    chosen = [Stage("first", (python(count),), 30), Stage("second", (python("print(1)"),), 30)]
    outcomes: dict[str, Outcome] = run(chosen[:1])
    run(chosen, outcomes, limit_s=0)
    assert outcomes["second"] == {"status": "skipped", "seconds": 0.0, "reason": "no time was left"}
    run(chosen, outcomes)
    assert outcomes["second"]["status"] == "ok"
    assert (tmp_path / "count").read_text() == "x", "what succeeded is not run again"


def plan(folder: Path) -> Plan:
    return Plan(("S", "XXL"), 90, folder, folder / "work", folder / "tiles.inc", 3.0)


def test_every_command_of_the_repository_exists(tmp_path: Path) -> None:
    found = stages(plan(tmp_path))
    names = [stage.name for stage in found]
    assert len(set(names)) == len(names)
    assert names.index("row S") < names.index("row XXL") < names.index("autotune") < names.index("row XXL, tuned")
    for stage in found:
        assert set(stage.needs) <= set(names[: names.index(stage.name)])
        for command in stage.commands:
            assert all(Path(word).exists() for word in command if word.endswith(".py")), command
    assert any("-DSCM_OPS_CUDA_ARCHITECTURES=90-real" in word for command in found[0].commands for word in command)


def cell(steps: int, batch_size: int, median: float | None) -> dict[str, Any]:
    shares = {"product_share": 0.42, "copy_share": None}
    return {
        "steps": steps,
        "batch_size": batch_size,
        "median_ms": median,
        "min_ms": median,
        "images_per_second": 9.0,
        "error": None if median else "no",
        **shares,
    }


def test_the_report_has_rows_a_roofline_and_what_failed(tmp_path: Path) -> None:
    result = {"cells": [cell(1, 1, 3.5), cell(2, 1, 7.0), cell(2, 8, None)], "peak": {"product_gflops": 790e3, "copy_gb_per_second": 4200.0}}
    (tmp_path / "bench-XXL.json").write_text(json.dumps(result))
    outcomes: dict[str, Outcome] = {
        "tests": {"status": "ok", "seconds": 12.0, "output": ["...", "12 passed in 11.0s"]},
        "operators": {"status": "failed", "seconds": 3.0, "output": ["Traceback", "no torch"]},
    }
    text = report({"hardware": "NVIDIA H200 9.0", "driver": "580"}, ["XXL", "S"], outcomes, tmp_path, dry_run=False)
    assert "| EDM2-XXL | 2 | 1 | 7 | 7 | 9 | 42% | – |" in text
    assert "| EDM2-XXL | 2 | 8 | failed |" in text
    row = next(line for line in text.splitlines() if line.startswith("| EDM2-XXL | 7.00 | 3.50 |"))
    roofline, reached, paper = (part.strip() for part in row.split("|")[4:7])
    assert 1.3 < float(roofline) < 1.8
    assert reached == f"{float(roofline) / 3.5:.0%}"
    assert float(paper) > float(roofline)
    assert "## operators: failed\n\n```\nTraceback\nno torch\n```" in text
    assert "12 passed" in text
    assert DRY_RUN not in text
    assert DRY_RUN in report({"hardware": "x"}, [], {}, tmp_path, dry_run=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a table of tiles, on a machine with a GPU."""
    root = tmp_path / "repository"
    monkeypatch.setattr(first_gpu, "resolve_device", lambda _: PLACEMENT)
    monkeypatch.setattr(first_gpu, "ROOT", root)
    monkeypatch.setattr(first_gpu, "BENCHMARKS", root / "benchmarks")
    table = root / "cpp_ops" / "src" / "convolution" / "tiles.inc"
    table.parent.mkdir(parents=True)
    table.write_text("")
    (root / "code.py").write_text("")
    git(root, "init", "--quiet")
    commit(root)
    return root


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@example.com", *arguments], check=True)


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "x")


def first_gpu_with(monkeypatch: pytest.MonkeyPatch, chosen: list[Stage], *arguments: str) -> dict[str, Outcome]:
    """Run the stages. Returns the outcomes."""
    plans: list[Plan] = []

    def stages(plan: Plan) -> list[Stage]:
        plans.append(plan)
        return chosen

    monkeypatch.setattr(first_gpu, "stages", stages)
    done = CliRunner(catch_exceptions=False).invoke(first_gpu.main, list(arguments))
    assert done.exit_code == 0, done.output
    record = json.loads((plans[0].results / "first-gpu.json").read_text())
    return dict(record["stages"])


def test_a_dry_run_writes_into_the_build_folder_only(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = first_gpu_with(monkeypatch, [Stage("writes", (python("print(1)"),), 30)], "--dry-run")
    assert outcomes["writes"]["status"] == "ok"
    assert not (repository / "benchmarks").exists()
    work = repository / "build" / "first-gpu"
    assert (work / "tiles.inc").exists()
    assert DRY_RUN in (work / "results" / "first-gpu.md").read_text()
    assert "there is no stage nothing" in CliRunner().invoke(first_gpu.main, ["--dry-run", "--skip", "nothing"]).output


def test_a_stage_that_is_left_out_is_run_by_the_next_call(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [Stage("build", (python("print(1)"),), 30), Stage("row", (python("print(2)"),), 30, needs=("build",))]
    first = first_gpu_with(monkeypatch, chosen, "--skip", "build")
    assert {name: (one["status"], one["reason"]) for name, one in first.items()} == {"build": ("skipped", "left out"), "row": ("skipped", "needs build")}
    assert [one["status"] for one in first_gpu_with(monkeypatch, chosen).values()] == ["ok", "ok"]
    assert [one["status"] for one in first_gpu_with(monkeypatch, chosen, "--skip", "build").values()] == ["ok", "ok"], "what was done before stays done"


def test_a_second_call_goes_on_after_autotune_but_not_with_other_code(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = repository / "cpp_ops" / "src" / "convolution" / "tiles.inc"
    tune = f"open({str(table)!r}, 'a').write('x'); open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    chosen = [Stage("autotune", (python(tune),), 30)]
    for _ in range(2):
        first_gpu_with(monkeypatch, chosen)
    assert (tmp_path / "runs").read_text() == "x"
    (repository / "code.py").write_text("changed")
    first_gpu_with(monkeypatch, chosen)
    assert (tmp_path / "runs").read_text() == "xx"
    commit(repository)
    first_gpu_with(monkeypatch, chosen)
    assert (tmp_path / "runs").read_text() == "xxx"


@pytest.mark.parametrize("where", ["CUDACXX", "PATH", "the usual folder"])
def test_nvcc_is_found_where_cmake_is_told_to_look(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "cuda" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(nvcc.parent if where == "PATH" else tmp_path))
    monkeypatch.setenv("CUDACXX", str(nvcc) if where == "CUDACXX" else "")
    monkeypatch.setattr("_first_gpu.stages.CUDA_FOLDER", str(nvcc.parent if where == "the usual folder" else tmp_path))
    build = stages(plan(tmp_path))[0]
    assert build.unavailable is None
    assert f"-DCMAKE_CUDA_COMPILER={nvcc}" in build.commands[0]
    monkeypatch.setenv("CUDACXX", str(tmp_path / "missing"))
    assert "nvcc was not found" in str(stages(plan(tmp_path))[0].unavailable)


def test_a_build_fails_if_this_python_does_not_find_the_library(tmp_path: Path) -> None:
    check = [sys.executable, str(ROOT / "benchmarks" / "_first_gpu" / "installed.py"), str(tmp_path)]
    build = next(stage for stage in stages(plan(tmp_path)) if stage.name == "build")
    assert build.commands[-1][:2] == check[:2]
    (tmp_path / "scm_runtime" / "_native").mkdir(parents=True)
    (tmp_path / "scm_runtime" / "_native" / LIBRARY).touch()
    outcome = run([Stage("build", (check,), 60)])["build"]
    assert outcome["status"] == "failed"
    assert "was installed, and scm_runtime finds" in outcome["output"][-1]
    rows = [stage for stage in stages(plan(tmp_path)) if stage.name.startswith("row")]
    assert all("--native-ops" in stage.commands[0] for stage in rows), "a row without the kernels fails"


def test_without_a_gpu_the_scripts_say_so() -> None:
    for script in (first_gpu.main, autotune.main):
        done = CliRunner().invoke(script, [])
        assert done.exit_code == 1
        assert "no GPU, nothing" in done.output


# ----------------------------------------------------------------------------
# The table of measured tiles.


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
