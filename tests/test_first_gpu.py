"""``make first-gpu``: a stage that fails, hangs or cannot run stops no other, outcomes are kept as they come, and a second call goes on. No GPU is used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # the scripts import one another from there

import autotune
import first_gpu
from _first_gpu.report import DRY_RUN, report
from _first_gpu.runner import Outcome, run_stages
from _first_gpu.stages import Plan, Stage, stages

from scm_runtime.devices.placement import Placement
from scm_runtime.ort.native_ops import LIBRARY

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
