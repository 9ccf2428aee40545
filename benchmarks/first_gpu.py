"""What does a GPU do that has never run this project? One command: build, tests, autotune, rows of EDM2-S and XXL, roofline, and a report to commit.

    make first-gpu                                    about ten minutes; results in benchmarks/results/<name of the GPU>
    make first-gpu ARGS="--minutes 20 --size S"
    python benchmarks/first_gpu.py --dry-run --skip build     on the stub GPU (tests/stub): small models, meaningless figures

It runs with the Python that it is called with, and installs the library that it builds there, but no packages: that Python needs onnxruntime-gpu, onnx, torch
and the other packages of the tests. Each stage has a time limit, and one that fails stops no other. Each outcome is written as it comes; a second call goes on
where the first one ended.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from _autotune.table import TABLE
from _common import read_json, write_whole
from _first_gpu.report import report
from _first_gpu.runner import run_stages
from _first_gpu.stages import BENCHMARKS, ROOT, Plan, stages

from scm_export.networks.edm2 import PRESETS
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.devices.placement import resolve_device
from scm_runtime.errors import ScmError

RECORD = "first-gpu.json"
OUTPUTS = (f":(exclude){TABLE.relative_to(ROOT)}", ":(exclude)benchmarks/results")
"""Files that a call writes: they do not make the next one another version's."""


def folder_name(hardware: str) -> str:
    """Return the name of the results' folder for a GPU: "nvidia-h200" for "NVIDIA H200 9.0"."""
    return re.sub(r"[^a-z0-9]+", "-", hardware.rsplit(" ", 1)[0].lower()).strip("-")


def describe(hardware: str) -> dict[str, str]:
    """Return the GPU, its driver, and the versions of what runs."""
    about = {"hardware": hardware, "ONNX Runtime": load_onnxruntime().__version__, "Python": platform.python_version()}
    if driver := _first_line("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"):
        about["driver, largest clock, power limit"] = driver
    if commit := _first_line("git", "-C", str(ROOT), "describe", "--always"):
        about["commit"] = commit + (
            "-dirty" if _first_line("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", ".", *OUTPUTS) else ""
        )
    return about


def _first_line(*command: str) -> str | None:
    """Return the first line that a command prints; None if it fails or prints nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def environment(results: Path) -> dict[str, str]:
    """Return the environment of the stages: this Python's programs first, and results in their folder."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return {**os.environ, "PATH": path, "SCM_BENCH_RESULTS": str(results), "PYTHONUNBUFFERED": "1"}


def store(results: Path, about: Mapping[str, str], plan: Plan, outcomes: dict[str, Any], *, dry_run: bool) -> None:
    """Write the record and the report."""
    date = datetime.now(UTC).date().isoformat()
    write_whole(results / RECORD, json.dumps({"about": about, "date": date, "dry_run": dry_run, "sizes": plan.sizes, "stages": outcomes}, indent=2) + "\n")
    write_whole(results / "first-gpu.md", report(about, plan.sizes, outcomes, results, dry_run=dry_run))


@click.command()
@click.option("--minutes", type=float, default=10.0, show_default=True, help="Time for all stages.")
@click.option("--size", "sizes", type=click.Choice(list(PRESETS)), multiple=True, help="Sizes of EDM2; by default S and XXL, in a dry run XXS.")
@click.option("--skip", multiple=True, help="A stage to leave out.")
@click.option("--again", is_flag=True, help="Forget the outcomes of earlier runs.")
@click.option("--dry-run", is_flag=True, help="Try the stages without a real GPU: results in build/first-gpu, the library's table stays.")
def main(minutes: float, sizes: tuple[str, ...], skip: tuple[str, ...], again: bool, dry_run: bool) -> None:
    """Build, test, tune and measure on this GPU, and write a report to commit."""
    try:
        hardware = resolve_device("cuda").hardware
    except ScmError as error:
        raise click.ClickException(f"no GPU, nothing is done: {error}") from error
    work = ROOT / "build" / "first-gpu"
    results = work / "results" if dry_run else BENCHMARKS / "results" / folder_name(hardware)
    table = work / TABLE.name if dry_run else TABLE
    if dry_run:
        work.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(TABLE, table)
    capability = int(hardware.rsplit(" ", 1)[1].replace(".", ""))
    chosen = sizes or (("XXS",) if dry_run else ("S", "XXL"))
    plan = Plan(chosen, capability, results, work, table, seconds=0.2 if dry_run else 3.0, patience=4.0 if dry_run else 1.0)
    known, about = stages(plan), describe(hardware)
    if unknown := sorted(set(skip) - {stage.name for stage in known}):
        raise click.BadParameter(f"there is no stage {', '.join(unknown)}; there are: {', '.join(stage.name for stage in known)}", param_hint="--skip")
    earlier = read_json(results / RECORD)
    same = earlier.get("about", {}).get("commit") == about.get("commit") and earlier.get("sizes") == list(plan.sizes)
    outcomes: dict[str, Any] = dict(earlier["stages"]) if same and not again else {}

    def keep() -> None:
        store(results, about, plan, outcomes, dry_run=dry_run)

    results.mkdir(parents=True, exist_ok=True)
    run_stages(known, outcomes, limit_s=60 * minutes, environment=environment(results), keep=keep, say=click.echo, left_out=skip)
    keep()
    click.echo(
        f"\n{(results / 'first-gpu.md').read_text()}\nThe report is {results / 'first-gpu.md'}: commit the folder" + (f" and {table}." if not dry_run else ".")
    )


if __name__ == "__main__":
    main()
