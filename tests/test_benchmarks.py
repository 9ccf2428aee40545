"""The benchmarks report what happened: a peer that is missing, fails, hangs or computes something else stops no other. No test checks a time."""

from __future__ import annotations

import json
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # the scripts import one another from there

import _common
import figures
import peers
from _figures.tables import milliseconds
from _peers.case import INPUTS, REFERENCE, Case, Facts
from _peers.catalogue import PEERS, Peer
from _peers.installed import install_bytes
from _peers.rounds import Plan, Row
from _peers.sizes import SIZES, Size

FAKES = """
import os, time
import numpy as np

def steady(case, n, threads, device, **options):
    if options.get("broken"):
        raise ValueError("this variant is not for you\\nsecond line")
    print("libraries may print")
    x = np.load(case.folder / "reference.npy")[:n]
    return lambda: x

def broken(case, n, threads, device):
    raise RuntimeError("no such kernel\\nand a long story")

def wrong(case, n, threads, device):
    x = np.load(case.folder / "reference.npy")[:n]
    return lambda: x * 1.5

def crashing(case, n, threads, device):
    draws = steady(case, n, threads, device)
    left = [4]
    def draw():
        left[0] -= 1
        if not left[0]:
            os._exit(3)
        return draws()
    return draw

def hanging(case, n, threads, device):
    time.sleep(60)
"""
SCRIPT_FOLDERS = ("benchmarks", "examples/digits", "tests", "tests/fuzz", "tests/soak")
OPTIONAL_PACKAGES = {"cuda", "cupy", "jax", "nvidia", "openvino", "tensorrt", "torch"}  # which a machine with a GPU may have

TINY = Size("tiny", "edm2", 1000)


def fake(name: str, opener: str, **fields: Any) -> Peer:
    return Peer(name=name, opener=f"fake_peers:{opener}", dtype="fp32", **{"needs": "numpy", "install": "it", "distributions": ("numpy",), **fields})


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A case without a model, and fake peers that need none."""
    (tmp_path / "fake_peers.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "case"
    folder.mkdir()
    shape = (2, 4, 8, 8)
    noises = {f"noise_{k}": np.zeros(shape, np.float32) for k in range(3)}
    np.savez(folder / INPUTS, allow_pickle=False, **noises, class_labels=np.arange(2))
    np.save(folder / REFERENCE, np.random.default_rng(0).standard_normal(shape, np.float32))
    Case(folder, Facts("tiny", "edm2", "none.pt", [1.5, 1.1, 0.0], 0.5, 0.5, [0, 1], 1000, 1e6)).save()
    return Case.load(folder)


def measure(case: Case, peers: list[Peer], size: Size = TINY, timeout: float = 60.0) -> dict[str, dict[str, Any]]:
    plan = Plan("cpu", 1, seconds=0.0, rounds=2, min_rounds=1, timeout=timeout)
    return Row(case, size, 2, plan, case.folder / "scratch", lambda line: None).measure(peers)


def test_peers_that_cannot_run_are_reported_and_stop_nobody(case: Case) -> None:
    found = measure(
        case,
        [
            fake("absent", "steady", needs="no_such_module_here", install="no-such-package"),
            fake("broken", "broken"),
            fake("wrong", "wrong"),
            fake("crashing", "crashing"),
            fake("other family", "steady", families=("consistency",)),
            fake("scm_runtime", "steady"),
            fake("another", "steady"),
        ],
    )
    assert {name: row["status"] for name, row in found.items()} == {
        "absent": "missing",
        "broken": "failed",
        "wrong": "wrong",
        "crashing": "failed",
        "other family": "not for this model",
        "scm_runtime": "ok",
        "another": "ok",
    }
    assert found["absent"]["reason"] == "no_such_module_here is not installed: pip install no-such-package"
    assert found["broken"]["reason"] == "RuntimeError: no such kernel"
    assert "off by 0.5" in found["wrong"]["reason"]
    assert "exit code 3" in found["crashing"]["reason"]
    ours, other = found["scm_runtime"], found["another"]
    assert ours["draws"] >= 2
    assert ours["min_ms"] <= ours["median_ms"] <= ours["p95_ms"]
    assert ours["error_share"] == 0
    assert ours["peak_bytes"] > 1e6
    assert ours["install_bytes"] == install_bytes(("numpy",))
    assert "times_as_long" in other
    assert "times_as_long" not in ours


def test_a_peer_that_never_answers_is_given_up(case: Case) -> None:
    found = measure(case, [fake("hanging", "hanging"), fake("scm_runtime", "steady")], timeout=5.0)
    assert found["hanging"] == {"status": "failed", "reason": "no answer within 5 s", "dtype": "fp32"}
    assert found["scm_runtime"]["status"] == "ok"


def test_of_several_variants_one_that_works_is_measured(case: Case) -> None:
    found = measure(case, [fake("several", "steady", variants=({"broken": True}, {"broken": False}, {"color": "red"}))])["several"]
    assert found["status"] == "ok"
    assert "broken=False" in found["settings"] or "color=red" in found["settings"]


def test_peers_that_do_not_fit_at_once_take_turns_and_one_that_never_fits_is_skipped(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def available() -> int:  # enough memory for the first two peers, then for the third one after the second has ended; never for the last
        asked.append(1)
        return {3: 0}.get(len(asked), 4_000_000_000)

    monkeypatch.setattr("_peers.rounds.available_bytes", available)
    huge = Size("huge", "edm2", 200_000_000, trial=False)
    found = measure(case, [fake("scm_runtime", "steady"), fake("a", "steady"), fake("b", "steady"), fake("c", "steady", memory=9.0)], huge)
    assert [row["status"] for row in found.values()] == ["ok", "ok", "ok", "skipped"]
    assert "needs about 8.4 GB of memory, and 4.0 GB are available" in found["c"]["reason"]
    assert found["scm_runtime"]["draws"] > found["a"]["draws"]  # it is measured alongside each of them
    assert "times_as_long" in found["b"]


def test_too_little_memory_is_found_out_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "available_bytes", lambda: 8_000_000_000)
    monkeypatch.setattr(peers, "_run_stage", lambda *_: pytest.fail("it started"))
    with (
        pytest.raises(peers.NotPreparedError, match=r"making EDM2-XXL 64x64x4 needs about 10.3 GB of memory, and 8.0 GB"),
        peers.prepared("XXL", 1, 2, "cpu", None),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "XXXS"], "there is no size 'XXXS'; there are: digits;"),
        (["--peers", "tensorflow"], "there is no peer for cpu 'tensorflow'; there are: scm_runtime;"),
        (["--batch-sizes", "1,x"], "whole numbers"),
        (["--batch-sizes", "0"], "at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(peers.main, arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_without_a_gpu_the_script_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "gpu", lambda: None)
    done = CliRunner().invoke(peers.main, ["--device", "cuda"])
    assert done.exit_code == 1
    assert "no NVIDIA GPU was found" in done.output


def test_names_with_commas_are_understood() -> None:
    names = list(PEERS["cpu"])
    assert peers._join_names(["scm_runtime", "function bodies", "PyTorch eager"], names) == ["scm_runtime, function bodies", "PyTorch eager"]
    assert set(SIZES) >= {"digits", "XXS", "S", "XXL"}


def test_rows_stand_in_the_order_of_sizes_whenever_they_were_measured() -> None:
    measured = [("XXL", 1), ("S", 8), ("digits", 8), ("S", 1)]
    rows = {f"{size}, batch {n}": {"size": size, "batch_size": n, "steps": 2} for size, n in measured}
    assert list(peers._in_order(rows)) == ["digits, batch 8", "S, batch 1", "S, batch 8", "XXL, batch 1"]


def test_the_digits_are_drawn_by_ours_and_by_a_plain_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from _peers import prepare  # imports torch

    in_a_process = peers._run_stage

    def run_stage(stage: str, folder: Path, size: str, *options: Any) -> None:
        """Run one stage in a process of its own, as the script does, and the others here: each process takes seconds to import torch."""
        if stage == "checkpoint":
            in_a_process(stage, folder, size, *options)
        else:
            named = zip(("--samples", "--steps", "--device"), map(str, options), strict=True)
            prepare.main([stage, str(folder), size, *(word for pair in named for word in pair)], standalone_mode=False)

    monkeypatch.setattr(peers, "_run_stage", run_stage)
    monkeypatch.setattr(_common, "RESULTS", tmp_path)
    chosen = ["scm_runtime, function bodies", "ONNX Runtime, plain export"]
    done = CliRunner().invoke(peers.main, ["--sizes", "digits", "--batch-sizes", "2", "--rounds", "1", "--peers", ",".join(chosen)])
    assert done.exit_code == 0, done.output
    row = json.loads((tmp_path / "peers.json").read_text())["figures"]["rows"]["digits, batch 2"]
    assert {name: found["status"] for name, found in row["peers"].items()} == dict.fromkeys(chosen, "ok")
    assert row["flop_per_sample"] > row["parameters"]


@pytest.mark.parametrize("folder", SCRIPT_FOLDERS)
def test_scripts_do_not_hide_packages(folder: str) -> None:
    """The folder of a script comes first in sys.path: a module of its name, such as cuda, could not be imported."""
    scripts = {path.stem for path in (ROOT / folder).glob("*.py")} | {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    assert scripts
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() not in {ROOT, *(ROOT / name for name in SCRIPT_FOLDERS)}]
    known = OPTIONAL_PACKAGES | sys.stdlib_module_names
    assert {name for name in scripts if name in known or PathFinder.find_spec(name, elsewhere)} == set()


# ----------------------------------------------------------------------------
# The tables and plots of docs/benchmarks.md.


def peer(status: str = "ok", median: float = 10.0, **fields: Any) -> dict[str, Any]:
    if status != "ok":
        return {"status": status, "reason": "it is not here", "dtype": "fp32"}
    return {
        "status": status,
        "dtype": "fp32",
        "settings": "2 threads, defaults",
        "versions": {"numpy": "2.4.6"},
        "median_ms": median,
        "p95_ms": median * 1.1,
        "min_ms": median * 0.9,
        "samples_per_s": 1e3 / median,
        "draws": 10,
        "peak_bytes": 200_000_000,
        "cold_start_s": 0.5,
        "install_bytes": 1_300_000_000,
        "error_share": 1e-6,
        **fields,
    }


FIGURES = ("recognised", "frechet", "precision", "recall", "near", "copies")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of results, next to a page with markers for their tables."""
    row = {"date": "2026-11-23", "size": "XXS", "title": "EDM2-XXS", "batch_size": 1, "steps": 2, "threads": 2}
    found = {
        "scm_runtime": peer(),
        "PyTorch eager": peer(median=1500.0, times_as_long=150.0),
        "OpenVINO bf16": peer(median=8.0, times_as_long=0.8) | {"dtype": "bf16"},
        "torch.compile": peer("failed"),
    }
    machine = {"cpu": "Some(R) CPU", "cores": 2, "python": "3.11.7", "onnxruntime": "1.32.0"}
    evaluations = {"1 step": 5.0, "2 steps": 10.0, "63 evaluations": 315.0}
    teacher = {"title": "digits", "status": "ok", "date": "2026-11-23", "median_ms": evaluations, "times_as_fast": {"1 step": 63.0, "2 steps": 31.5}}
    skipped = {"title": "EDM2-XXL", "status": "skipped", "reason": "needs memory"}
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "peers.json").write_text(json.dumps({"machine": machine, "figures": {"rows": {"XXS, batch 1": {**row, "peers": found}}}}))
    (folder / "teacher.json").write_text(json.dumps({"machine": machine, "figures": {"digits": teacher, "XXL": skipped}}))
    good, fair = dict.fromkeys(FIGURES, (0.25, 0.125)), dict.fromkeys(FIGURES, (0.5, None))
    rows = [{"sampler": "teacher", "through": through, "sets": sets, "figures": shown} for through, sets, shown in (("PyTorch", 1, fair), ("fp32", 3, good))]
    changes = {"fp32": {"recognised": 0.001, "recall": 0.0021}}
    quality = {"samples": 10_000, "real": dict.fromkeys(FIGURES, 0.75), "rows": rows, "export_changes": changes}
    (folder / "quality.json").write_text(json.dumps(quality))
    places = "\n".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->" for name in ("peers", "peers-costs", "teacher", "quality"))
    (tmp_path / "benchmarks.md").write_text(f"# Title\n\n{places}\n\nThe end\n")
    return folder


def run_figures(results: Path, *arguments: str) -> Any:
    folder = results.parent
    return CliRunner().invoke(
        figures.main, ["--page", str(folder / "benchmarks.md"), "--images", str(folder / "images"), "--results", str(results), *arguments]
    )


def test_tables_and_plots_are_written_and_a_change_is_noticed(results: Path) -> None:
    assert run_figures(results, "--check").exit_code == 1
    done = run_figures(results)
    assert done.exit_code == 0, done.output
    page = results.parent / "benchmarks.md"
    text = page.read_text()
    assert "| EDM2-XXS | 1 | 10.0 ms | 1.50 s | **8.00 ms** | 150.00 |" in text
    assert "Not measured: torch.compile, EDM2-XXS, batch 1: it is not here." in text
    assert "| digits | 315 ms | 10.0 ms (32×) | 5.00 ms (63×) |" in text
    assert "EDM2-XXL: needs memory." in text
    assert "| 10 000 samples per set | sets, source |" in text
    assert "| teacher | 3, fp32 bundle | 0.250 ± 0.125 |" in text
    assert "fp32 0.21% (recall)." in text
    assert text.startswith("# Title")
    assert text.endswith("The end\n")
    drawn = {path.name: path.read_bytes() for path in (results.parent / "images").iterdir()}
    assert set(drawn) == {f"{name}-{theme}.svg" for name in ("peers", "teacher") for theme in ("light", "dark")}
    assert run_figures(results, "--check").exit_code == 0
    assert run_figures(results).exit_code == 0
    assert {path.name: path.read_bytes() for path in (results.parent / "images").iterdir()} == drawn  # the output is reproducible

    page.write_text(text.replace("1.50 s", "1.40 s"))
    done = run_figures(results, "--check")
    assert done.exit_code == 1
    assert "benchmarks.md" in done.output
    assert "Write them again: python benchmarks/figures.py" in done.output
    page.write_text(text)
    (results / "teacher.json").write_text((results / "teacher.json").read_text().replace('"date"', '"day": 1, "date"'))
    done = run_figures(results, "--check")
    assert done.exit_code == 1
    assert "teacher-dark.svg" in done.output
    assert "peers-dark.svg" not in done.output


def test_a_page_without_markers_is_an_error(results: Path) -> None:
    (results.parent / "benchmarks.md").write_text("no markers\n")
    done = run_figures(results)
    assert done.exit_code == 1
    assert "<!-- peers:begin -->" in done.output


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.50 ms"), (12.34, "12.3 ms"), (123.4, "123 ms"), (1234.0, "1.23 s"), (12345.0, "12.3 s"), (317_000.0, "317 s")]
)
def test_times_have_three_figures(value: float, text: str) -> None:
    assert milliseconds(value) == text
