"""The benchmarks report what happened: a peer that is missing, fails, hangs or computes something else stops no other. No test checks a time."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from support import ROOT, native_library

sys.path.insert(0, str(ROOT / "benchmarks"))  # the scripts import one another from there

import _common
import peers
from _common import Cells
from _peers import catalogue, preparing
from _peers.case import INPUTS, REFERENCE, WITHOUT_DOUBLE, Case, Facts
from _peers.catalogue import PEERS, Peer
from _peers.client import WorkerTimeoutError
from _peers.installed import install_bytes, versions
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

def slow(case, n, threads, device):
    draws = steady(case, n, threads, device)
    def draw():
        time.sleep(0.5)
        return draws()
    return draw
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


def measure(case: Case, peers: list[Peer], size: Size = TINY, cell_s: float = 60.0, rounds: int = 2, anchor: Peer | None = None) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    plan = Plan("cpu", 1, seconds=0.0, rounds=rounds, min_rounds=1, cell_s=cell_s)
    Row(case, size, 2, plan, case.folder / "scratch", lambda line: None, found.__setitem__).measure(peers, anchor)
    return found


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
    found = measure(case, [fake("hanging", "hanging"), fake("scm_runtime", "steady")], cell_s=4.0)
    numpy = {"numpy": np.__version__}
    assert found["hanging"] == {"status": "not measured", "reason": "it takes more than 4 s", "dtype": "fp32", "versions": numpy, "limit_s": 4.0}
    assert found["scm_runtime"]["status"] == "ok"


def test_a_peer_ends_at_its_limit_and_keeps_the_rounds_until_then(case: Case) -> None:
    found = measure(case, [fake("scm_runtime", "steady"), fake("slow", "slow")], cell_s=5.0, rounds=100)
    assert 1 <= found["slow"]["rounds"] < 10
    assert found["slow"]["rounds"] <= found["scm_runtime"]["rounds"]
    assert "times_as_long" in found["slow"]


class FakeWorker:
    """A worker whose start, and each call, take the seconds in its options, on a clock that only workers advance; 1 s unless they say so."""

    now = 0.0
    cold_start_s = error_share = 0.0
    first_ms = 1000.0

    def __init__(self, spec: dict[str, Any], scratch: Path, timeout: float, *_: object) -> None:
        self.timeout, self._calls = timeout, iter(spec["options"].get("calls", ()))
        self._wait(spec["options"].get("start", 1))

    def _wait(self, seconds: float) -> None:
        FakeWorker.now += min(seconds, self.timeout)
        if seconds > self.timeout:
            raise WorkerTimeoutError(f"no answer within {self.timeout:.0f} s")

    def draw(self, warm: int, count: int) -> list[float]:
        seconds = next(self._calls, 1)
        self._wait(seconds)
        return [seconds * 1e3]

    def memory(self) -> dict[str, int]:
        return {"peak_bytes": 1, "resident_bytes": 1}

    def close(self, timeout: float = 20) -> None:
        pass


@pytest.fixture
def fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "now", 0.0)
    monkeypatch.setattr("_peers.rounds.Worker", FakeWorker)
    monkeypatch.setattr("_peers.rounds.time", SimpleNamespace(monotonic=lambda: FakeWorker.now, perf_counter=lambda: FakeWorker.now, sleep=lambda _: None))


@pytest.mark.parametrize(("calls", "status"), [((60, 60, 93, 60), "ok"), ((300,), "not measured")])
def test_a_call_that_exceeds_the_limit_leaves_the_figures_of_earlier_rounds(case: Case, fake_workers: None, calls: tuple[int, ...], status: str) -> None:
    slowing = fake("slowing", "", variants=({"start": 210, "calls": calls},))
    found = measure(case, [fake("scm_runtime", ""), slowing], cell_s=420, rounds=5)
    assert found["slowing"]["status"] == status
    assert found["slowing"].get("rounds") == (2 if status == "ok" else None)
    assert found["slowing"].get("limit_s") == (None if status == "ok" else 420)
    assert found["scm_runtime"]["rounds"] == 5


def test_the_limit_holds_for_all_variants_together(case: Case, fake_workers: None) -> None:
    variants = ({"start": 100, "calls": (60, 60)}, {"start": 100, "calls": (60, 60)})
    found = measure(case, [fake("slow", "", variants=variants)], cell_s=300)
    assert found["slow"]["status"] == "not measured"
    assert FakeWorker.now <= 300


def test_what_was_measured_before_a_run_ends_is_kept(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, dict[str, Any]] = {}

    def keep(name: str, figures: dict[str, Any]) -> None:
        found[name] = figures
        if figures["rounds"] == 3:
            raise KeyboardInterrupt

    plan = Plan("cpu", 1, seconds=60.0, rounds=None, min_rounds=2, cell_s=60.0)
    with pytest.raises(KeyboardInterrupt):
        Row(case, TINY, 2, plan, case.folder / "scratch", lambda line: None, keep).measure([fake("scm_runtime", "steady"), fake("another", "steady")])
    assert {name: figures["rounds"] for name, figures in found.items()} == {"scm_runtime": 3, "another": 2}


def test_a_peer_that_is_measured_later_is_compared_with_ours_whose_figures_stay(case: Case) -> None:
    found = measure(case, [fake("another", "steady")], anchor=fake("scm_runtime", "steady"))
    assert list(found) == ["another"]
    assert found["another"]["times_as_long"] > 0


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


def test_too_little_memory_is_found_out_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "available_bytes", lambda: 8_000_000_000)
    monkeypatch.setattr(preparing, "_run_stages", lambda *_: pytest.fail("it started"))
    with pytest.raises(preparing.NotPreparedError, match=r"making EDM2-XXL 64x64x4 needs about 10.3 GB of memory, and 8.0 GB"):
        preparing.prepared("XXL", 1, work=tmp_path)


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


def test_rows_and_peers_stand_in_the_order_of_the_tables_whenever_they_were_measured() -> None:
    measured = [("XXL", 1), ("S", 8), ("digits", 8), ("S", 1)]
    ones: dict[str, Any] = {name: {} for name in ("OpenVINO f32", "a peer of the past", "scm_runtime")}
    rows = {f"{size}, batch {n}": {"size": size, "batch_size": n, "steps": 2, "peers": ones} for size, n in measured}
    found = peers.in_order("cpu", {"roof": {}, "rows": rows})["rows"]
    assert list(found) == ["digits, batch 8", "S, batch 1", "S, batch 8", "XXL, batch 1"]
    assert list(found["S, batch 1"]["peers"]) == ["scm_runtime", "OpenVINO f32", "a peer of the past"]


def test_a_peer_with_an_environment_of_its_own_runs_there(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "ENVIRONMENTS", tmp_path / "environments")
    own = fake("own", "steady", own="its-packages", install="its-packages", distributions=("its-packages",))
    assert measure(case, [own])["own"]["reason"] == "its-packages is not installed: python benchmarks/peers.py --install"
    python = own.python
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ntouch "{tmp_path}/used"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    info = tmp_path / "environments/its-packages/lib/python3/site-packages/its_packages-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: its-packages\nVersion: 1.5\n")
    (info / "RECORD").write_text("its_packages.py,,1000\n")
    found = measure(case, [own])["own"]
    assert (found["status"], found["versions"], found["install_bytes"]) == ("ok", {"its-packages": "1.5"}, 1000)
    assert (tmp_path / "used").exists()
    assert versions(("its-packages",)) == {}


def test_the_digits_are_drawn_by_ours_and_by_a_plain_export_and_not_again(tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from _peers import models, prepare  # imports torch

    def run_stages(stages: tuple[str, ...], folder: Path, size: str, *options: Any) -> None:
        """Make the models in this process, which has imported torch, of a smaller network."""
        named = zip(("--samples", "--steps", "--device", "--made-with"), (*map(str, options), preparing.made_with()), strict=True)
        prepare.main([",".join(stages), str(folder), size, *(word for pair in named for word in pair)], standalone_mode=False)

    def run() -> dict[str, Any]:
        arguments = ["--sizes", "digits", "--batch-sizes", "2", "--rounds", "1", "--peers", ",".join(chosen), "--work", str(tmp_path / "work")]
        done = CliRunner().invoke(peers.main, arguments)
        assert done.exit_code == 0, done.output
        row: dict[str, Any] = json.loads((tmp_path / "peers.json").read_text())["figures"]["rows"]["digits, batch 2"]
        return row

    monkeypatch.setattr(models, "DIGITS", small_checkpoint)
    monkeypatch.setattr(preparing, "USUAL_SAMPLES", 2)
    monkeypatch.setattr(preparing, "_run_stages", run_stages)
    monkeypatch.setattr(peers, "measure_peak_rates", lambda *_: {"copy_bytes_per_s": 1e10})
    monkeypatch.setattr(_common, "RESULTS", tmp_path)
    chosen = ["scm_runtime, function bodies", "ONNX Runtime, plain export"]
    row = run()
    assert {name: row["peers"][name]["status"] for name in chosen} == dict.fromkeys(chosen, "ok")
    assert row["flop_per_sample"] > row["parameters"]
    single = onnx.load(Case.load(tmp_path / "work" / "digits-cpu-2").plain(WITHOUT_DOUBLE), load_external_data=False)
    assert not [node for node in single.graph.node for a in node.attribute if a.name == "to" and a.i == onnx.TensorProto.DOUBLE]

    measured: list[str] = []
    monkeypatch.setattr(Row, "measure", lambda self, peers, anchor: measured.extend(peer.name for peer in peers))
    assert run()["peers"] == row["peers"]
    assert [name for name in measured if name in chosen] == []
    monkeypatch.setattr(_common, "build", lambda: "library of tomorrow, sources of today")
    monkeypatch.setattr(preparing, "_run_stages", run_stages)
    run()
    assert set(chosen) <= set(measured)


def test_steps_are_measured_with_the_kernels_of_convolutions() -> None:
    import _convolutions  # imports torch, as ops does

    import ops

    native_library()  # skips without it
    conv = _convolutions._model((1, 8, 16, 16), np.zeros((16, 16, 3, 3), np.float32), "scm.channels_last")
    ops.session(onnx.load_from_string(conv), "cpu", native=True)  # the model has no function body, so it needs the kernel


# ----------------------------------------------------------------------------
# What a run of peers.py measures


class Runs:
    """Runs ``Measurement`` with models that need no preparation, and peers whose figures are given."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured: list[str] = []
        self.prepared: list[str] = []
        self.error: preparing.NotPreparedError | None = None
        self.figures: dict[str, Any] = {"status": "ok"}

        def prepared(size: str, *_: object) -> SimpleNamespace:
            self.prepared.append(size)
            if self.error is not None:
                raise self.error
            return SimpleNamespace(facts=SimpleNamespace(parameters=1, flop=1.0))

        def row(*arguments: Any) -> SimpleNamespace:
            def run(chosen: list[Peer], anchor: Peer | None) -> None:
                for peer in chosen:
                    self.measured.append(peer.name)
                    arguments[-1](peer.name, {**self.figures, "versions": versions(peer.distributions)})

            return SimpleNamespace(measure=run)

        monkeypatch.setattr(_common, "RESULTS", folder)
        monkeypatch.setattr(_common, "build", lambda: "library a, sources b")
        monkeypatch.setattr(peers, "prepared", prepared)
        monkeypatch.setattr(peers, "Row", row)

    def run(self, *chosen: Peer, cell_s: float = 150, batch_sizes: tuple[int, ...] = (1,)) -> list[str]:
        """Return the names of the peers that were measured."""
        self.measured, self.prepared = [], []
        plan = Plan("cpu", 1, seconds=1.0, rounds=None, min_rounds=2, cell_s=cell_s)
        assert peers.Measurement(Cells("peers"), plan, 2, chosen, 20, Path()).measure({"digits": batch_sizes})
        return self.measured

    def row(self) -> Any:
        return Cells("peers").get("rows", "digits, batch 1")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


def test_a_missing_peer_changes_no_date(runs: Runs) -> None:
    ours, absent = fake("scm_runtime", ""), fake("absent", "", needs="no_such_module_here", distributions=("no-such-package",))
    assert runs.run(ours, absent) == ["scm_runtime"]
    assert runs.row()["peers"]["scm_runtime"]["date"] == datetime.now(UTC).date().isoformat()
    assert runs.row()["peers"]["absent"]["status"] == "missing"
    Cells("peers").note("rows", "digits, batch 1", "peers", "scm_runtime", "date", value="2026-11-01")
    before = runs.row()
    assert runs.run(ours, absent) == []
    assert runs.prepared == []
    assert {**before, "peers": {"scm_runtime": before["peers"]["scm_runtime"]}} == {**runs.row(), "peers": {"scm_runtime": runs.row()["peers"]["scm_runtime"]}}


def test_a_peer_that_exceeded_its_limit_is_tried_again_with_more_time(runs: Runs) -> None:
    runs.figures = {"status": "not measured", "limit_s": 150}
    assert runs.run(fake("scm_runtime", ""), cell_s=150) == ["scm_runtime"]
    assert runs.run(fake("scm_runtime", ""), cell_s=150) == []
    assert runs.run(fake("scm_runtime", ""), cell_s=1800) == ["scm_runtime"]


@pytest.mark.parametrize("status", ["ok", "failed", "wrong"])
def test_another_version_of_a_peer_is_measured_again(runs: Runs, monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    runs.figures = {"status": status}
    assert runs.run(fake("scm_runtime", "")) == ["scm_runtime"]
    assert runs.run(fake("scm_runtime", "")) == []
    monkeypatch.setattr(peers, "versions", lambda *_: {"numpy": "99"})
    assert runs.run(fake("scm_runtime", "")) == ["scm_runtime"]


def test_a_model_that_cannot_be_prepared_is_tried_once(runs: Runs) -> None:
    runs.error = preparing.NotPreparedError("it is too large")
    assert runs.run(fake("scm_runtime", ""), fake("late", "", place=2), batch_sizes=(1, 8)) == []
    assert runs.prepared == ["digits"]
    assert Cells("peers").get("not_measured", "digits") == "it is too large"


@pytest.mark.parametrize("folder", SCRIPT_FOLDERS)
def test_scripts_do_not_hide_packages(folder: str) -> None:
    """The folder of a script comes first in sys.path: a module of its name, such as cuda, could not be imported."""
    scripts = {path.stem for path in (ROOT / folder).glob("*.py")} | {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    assert scripts
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() not in {ROOT, *(ROOT / name for name in SCRIPT_FOLDERS)}]
    known = OPTIONAL_PACKAGES | sys.stdlib_module_names
    assert {name for name in scripts if name in known or PathFinder.find_spec(name, elsewhere)} == set()
