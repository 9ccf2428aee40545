"""``scm-runtime bench``: figures are consistent, counts are right, and failures are reported. Durations are not tested."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

import toy_bundle
from scm_runtime.bench import cells as bench_cells
from scm_runtime.bench import machine as bench_machine
from scm_runtime.bench.cells import CellRun
from scm_runtime.bench.flops import count_graph
from scm_runtime.bench.result import MachinePeak
from scm_runtime.cli import main
from scm_runtime.cli.bench import bench_progress
from scm_runtime.devices.placement import CPU
from support import BLOCK_IMPORTS, ROOT, run_python

PEAK = MachinePeak(matmul_gflops=50.0, copy_gb_per_second=8.0, how="as the test says")
QUICK = ("--seconds", "0", "--threads", "1", "--device", "cpu")


@pytest.fixture(autouse=True)
def peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves seconds per run. test_bench_peak.py tests the measurement."""
    monkeypatch.setattr("scm_runtime.bench.run.measure_cpu_peak", lambda threads: PEAK)


def call(*arguments: object, code: int = 0, width: int = 120) -> Result:
    """Run the command in this process; an exception other than SystemExit fails the test."""
    result = CliRunner(catch_exceptions=False).invoke(main, ["bench", *map(str, arguments)], env={"COLUMNS": str(width)})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def measured(*arguments: object, code: int = 0) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(call(*arguments, "--json", code=code).stdout)
    return document


def keys(document: dict[str, Any]) -> list[tuple[int, int]]:
    return [(cell["steps"], cell["batch_size"]) for cell in document["cells"]]


# ----------------------------------------------------------------------------
# Figures.


def test_the_figures_are_consistent() -> None:
    document = measured("digits", "--batch-sizes", "1,3", "--steps", "1,2", *QUICK)
    assert keys(document) == [(1, 1), (1, 3), (2, 1), (2, 3)]
    for cell in document["cells"]:
        assert cell["error"] is None
        assert cell["runs"] >= 3
        assert cell["evaluations"] == cell["steps"]
        assert 0 < cell["min_ms"] <= cell["median_ms"] <= cell["p95_ms"]
        assert cell["images_per_second"] == pytest.approx(1e3 * cell["batch_size"] / cell["median_ms"])
        assert 0 < cell["parts_ms"]["steps"] < cell["p95_ms"]
        assert cell["parts_ms"]["noise"] > 0
        flop = cell["batch_size"] * (cell["evaluations"] * document["work"]["step_gflop"] + document["work"]["decode_gflop"])
        assert cell["gflops"] == pytest.approx(1e3 * flop / cell["median_ms"])
        assert cell["product_share"] == pytest.approx(cell["gflops"] / PEAK.matmul_gflops)
        weights = cell["evaluations"] * document["bundle"]["parameters"] * 4 / 1e9
        assert cell["weights_gb_per_second"] == pytest.approx(1e3 * weights / cell["median_ms"])
        assert cell["copy_share"] == pytest.approx(cell["weights_gb_per_second"] / PEAK.copy_gb_per_second)
    assert document["bundle"]["name"] == "digits"
    assert (document["device"], document["dtype"], document["threads"]) == ("cpu", "fp32", 1)
    assert 2**20 < document["memory"]["process_opened"] <= document["memory"]["process_peak"]
    assert document["memory"]["device_peak"] is None
    assert document["open_ms"] > 0
    assert document["interrupted"] is False
    assert document["comparison"] is None


def test_one_and_two_steps_of_one_and_eight_by_default() -> None:
    assert keys(measured("digits", *QUICK)) == [(1, 1), (1, 8), (2, 1), (2, 8)]


def test_the_tables() -> None:
    result = call("digits", "--batch-sizes", "2", "--steps", "1", *QUICK)
    text = " ".join(result.stdout.split())
    for said in (
        "digits, edm2, 1.59 M parameters",
        "cpu, ",
        "fp32",
        "GFLOP per evaluation",
        "6.36 MB of weights",
        "50 GFLOP/s in matrix products",
        "MiB at the peak",
    ):
        assert said in text
    assert "share of the machine's measured peak" in text
    assert "×" not in text
    assert result.stderr == ""  # it is not a terminal
    assert max(map(len, call("digits", "--batch-sizes", "2", "--steps", "1", *QUICK, width=80).stdout.splitlines())) <= 80


def test_cells_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    original = CellRun.measure_round

    def noted(row: CellRun, seconds: float) -> None:
        order.append((row.steps, row.batch_size))
        original(row, seconds)

    monkeypatch.setattr(bench_cells, "ROUND_S", 0)
    monkeypatch.setattr(CellRun, "measure_round", noted)
    document = measured("digits", "--batch-sizes", "1,2", "--steps", "2,1", *QUICK)
    assert order == [(2, 1), (2, 2), (1, 1), (1, 2)] * 3
    assert [cell["runs"] for cell in document["cells"]] == [3] * 4


def test_seconds_are_measured() -> None:
    (cell,) = measured("digits", "--batch-sizes", "1", "--steps", "1", *QUICK, "--seconds", "0.5")["cells"]
    assert cell["runs"] > 3
    assert cell["runs"] * cell["p95_ms"] > 250


def test_a_text_to_image_model_gets_placeholder_embeddings(tmp_path: Path) -> None:
    bundle = toy_bundle.write_text_bundle(tmp_path / "text.scm")
    document = measured(bundle, "--batch-sizes", "1,2", *QUICK)
    assert keys(document) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert document["work"]["step_gflop"] == 2 * toy_bundle.WIDTH * 2 / 1e9  # its projection is its only product
    assert document["work"]["uncounted"] == []


def test_a_bundle_without_these_steps_is_measured_at_its_smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_bundle, "TIMES", {"3": (1.5, 1.0, 0.5, 0.0), "4": (1.5, 1.0, 0.5, 0.2, 0.0)})
    document = measured(toy_bundle.write_text_bundle(tmp_path / "text.scm"), "--batch-sizes", "1", *QUICK)
    assert keys(document) == [(3, 1)]


def test_samplers_of_a_diffusion_model(tiny_guided: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bundle, path = tiny_guided[0], tmp_path / "before.json"
    arguments = (bundle, "--batch-sizes", "1", *QUICK)
    (cell,) = measured(*arguments, "--sampler", "dpm-solver-2s")["cells"]
    assert (cell["steps"], cell["evaluations"], cell["runs"]) == (32, 63, 3)
    (own,) = measured(*arguments, "--steps", "8", "-o", path)["cells"]
    assert (own["steps"], own["evaluations"]) == (8, 8)
    document = measured(*arguments, "--steps", "8", "--sampler", "heun", "--compare", path)
    assert document["sampler"] == "heun"
    assert document["comparison"]["differences"] == ["sampler: the bundle's default there, heun here"]
    assert "sampler heun" in call(*arguments, "--steps", "8", "--sampler", "heun").stdout
    assert "sampler must be one of" in call(*arguments, "--sampler", "euler", code=2).stderr


def test_it_never_imports_torch_onnx_or_the_exporter(tiny_bundle: Path) -> None:
    program = """
from scm_runtime.cli import main
main(["bench", sys.argv[2], "--seconds", "0", "--batch-sizes", "1", "--threads", "1"], standalone_mode=False)
loaded = Block.names & {name.split(".")[0] for name in sys.modules}
assert not loaded, loaded
"""
    done = run_python(BLOCK_IMPORTS + program, "torch,onnx,onnxscript,scm_export", tiny_bundle)
    assert "GFLOP/s in matrix products" in done.stdout  # measured
    assert done.stderr == ""


# ----------------------------------------------------------------------------
# Counts.


def test_operations_are_those_that_torch_counts() -> None:
    """Compared with torch's count for the network that the embedded bundle was exported from."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from scm_export.checkpoints import Checkpoint, load
    from scm_export.networks.edm2 import UNet, UNetConfig

    checkpoint = load(ROOT / "examples" / "digits" / "digits.pt")
    assert isinstance(checkpoint, Checkpoint)
    config: Any = checkpoint.config
    net = UNet(UNetConfig(**config)).eval()
    size = net.config.img_resolution if hasattr(net, "config") else config["img_resolution"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, config["img_channels"], size, size), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    document = measured("digits", "--batch-sizes", "1", "--steps", "1", *QUICK)
    assert document["work"]["step_gflop"] == counter.get_total_flops() / 1e9
    assert document["work"]["decode_gflop"] == 0


GRAPHS: dict[str, tuple[str, dict[str, tuple[int, ...]], int]] = {
    "product": ("(float[2,3,5,7] x, float[7,11] w) => (float[2,3,5,11] y) { y = MatMul(x, w) }", {"x": (2, 3, 5, 7), "w": (7, 11)}, 2 * 30 * 7 * 11),
    "gemm": ("(float[2,7] x, float[11,7] w) => (float[2,11] y) { y = Gemm<transB=1>(x, w) }", {"x": (2, 7), "w": (11, 7)}, 2 * 2 * 7 * 11),
    "gemm of a transposed matrix": (
        "(float[7,2] x, float[7,11] w) => (float[2,11] y) { y = Gemm<transA=1>(x, w) }",
        {"x": (7, 2), "w": (7, 11)},
        2 * 2 * 7 * 11,
    ),
    "convolution in groups": (
        "(float[2,6,9,9] x, float[4,3,3,3] w) => (float[2,4,4,4] y) { y = Conv<group=2, strides=[2,2]>(x, w) }",
        {"x": (2, 6, 9, 9), "w": (4, 3, 3, 3)},
        2 * (2 * 4 * 4 * 4) * (3 * 3 * 3),
    ),
    "transposed convolution": (
        "(float[1,4,5,5] x, float[4,3,2,2] w) => (float[1,3,10,10] y) { y = ConvTranspose<strides=[2,2]>(x, w) }",
        {"x": (1, 4, 5, 5), "w": (4, 3, 2, 2)},
        2 * (4 * 5 * 5) * (3 * 2 * 2),
    ),
    "nothing": ("(float[2,3] x, float[2,3] w) => (float[2,3] y) { y = Mul(x, w) }", {"x": (2, 3), "w": (2, 3)}, 0),
}


def graph_file(folder: Path, text: str) -> Path:
    path = folder / "graph.onnx"
    path.write_bytes(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]>\ngraph {text}').SerializeToString())
    return path


@pytest.mark.parametrize("name", GRAPHS)
def test_operations_of_one_operator(name: str, tmp_path: Path) -> None:
    text, shapes, flop = GRAPHS[name]
    count = count_graph(graph_file(tmp_path, text), CPU, 1, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    assert count == (flop, frozenset())
    assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"]


def test_operators_that_cannot_be_counted_are_named(tmp_path: Path) -> None:
    text = '(float[2,3] x, float[3,4] w) => (float[2,4] y) { y = Einsum<equation="ij,jk->ik">(x, w) }'
    count = count_graph(graph_file(tmp_path, text), CPU, 1, {"x": np.ones((2, 3), np.float32), "w": np.ones((3, 4), np.float32)})
    assert count == (0, frozenset(["Einsum"]))


def test_a_graph_that_cannot_be_profiled_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Any:
        raise OSError("No space left on device")

    monkeypatch.setattr("scm_runtime.bench.run.count_graph", full)
    monkeypatch.setattr("scm_runtime.bench.run.measure_cpu_peak", lambda threads: MachinePeak(reason="its process failed"))
    arguments = ("digits", "--batch-sizes", "1", "--steps", "1", *QUICK)
    document = measured(*arguments)
    (cell,) = document["cells"]
    assert cell["median_ms"] > 0
    assert (cell["product_share"], cell["copy_share"], cell["gflops"]) == (None, None, None)
    assert "No space left on device" in document["work"]["reason"]
    text = " ".join(call(*arguments).stdout.split())
    assert "operations not counted: a graph could not be profiled: No space left on device" in text
    assert "not measured: its process failed" in text


def test_the_best_of_two_peaks() -> None:
    none, one, two = MachinePeak(reason="why"), MachinePeak(matmul_gflops=1, copy_gb_per_second=4), MachinePeak(matmul_gflops=2, copy_gb_per_second=3)
    assert bench_machine.best_of(one, two) == MachinePeak(matmul_gflops=2, copy_gb_per_second=4)
    assert bench_machine.best_of(none, two) == two
    assert bench_machine.best_of(one, none) == one
    assert bench_machine.best_of(none, none) == none


# ----------------------------------------------------------------------------
# Files and comparisons.


def test_a_result_is_written_and_compared_with(tmp_path: Path) -> None:
    path = tmp_path / "new" / "before.json"
    before = measured("digits", "--batch-sizes", "1,2", "--steps", "1", *QUICK, "-o", path)
    assert json.loads(path.read_text()) == before
    assert [file.name for file in path.parent.iterdir()] == ["before.json"]
    arguments = ("digits", "--batch-sizes", "2,4", "--steps", "1,2", *QUICK, "--compare", path)
    after = measured(*arguments)
    (ratios,) = after["comparison"]["ratios"]
    old, new = before["cells"][1], after["cells"][0]
    assert (ratios.pop("steps"), ratios.pop("batch_size")) == (1, 2) == (old["steps"], old["batch_size"])
    assert ratios == pytest.approx({name: new[name] / old[name] for name in ("median_ms", "p95_ms", "min_ms", "images_per_second")})
    assert after["comparison"]["process_peak"] == pytest.approx(after["memory"]["process_peak"] / before["memory"]["process_peak"])
    assert after["comparison"]["differences"] == []
    text = call(*arguments).stdout
    assert len(re.findall(r"×\d+\.\d\d", text)) == 5  # four figures, and the memory
    assert f"this run divided by '{path}'" in text
    assert "different:" not in text


def test_differences_are_reported(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    measured(tiny_bundle, "--batch-sizes", "1", "--steps", "1", *QUICK, "-o", path)
    arguments = ("digits", "--batch-sizes", "1", "--steps", "1", *QUICK, "--threads", "2", "--compare", path)
    differences = measured(*arguments)["comparison"]["differences"]
    assert differences == ["another bundle: 'tiny' there, 'digits' here", "threads: 1 there, 2 here"]
    assert "different: another bundle: 'tiny' there, 'digits' here" in call(*arguments).stdout
    document = json.loads(path.read_text())
    document["versions"]["onnxruntime"] = "1.0"
    document["bundle"]["name"] = "digits"
    path.write_text(json.dumps(document))
    differences = measured(*arguments)["comparison"]["differences"]
    assert differences[0] == "another bundle: 'digits' with other files"
    assert differences[-1].startswith("onnxruntime: 1.0 there, ")


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A file with a changed result."""

    def write(path: Path) -> None:
        measured("digits", "--batch-sizes", "1", "--steps", "1", *QUICK, "-o", path)
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return write


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file"),
    "a folder": (lambda path: path.mkdir(), "is a directory"),
    "no JSON": (lambda path: path.write_bytes(b"\xff\x00weights"), "is not the result of a benchmark"),
    "other JSON": (lambda path: path.write_text('{"machine": {}, "figures": {}}'), "is JSON, but not the result"),
    "a list": (lambda path: path.write_text("[1]"), "is JSON, but not the result"),
    "a newer version": (edited(lambda document: document.update(version=2)), "has version 2 of the format, this scm-runtime reads version 1"),
    "no cells": (edited(lambda document: document.pop("cells")), "is not the result of a benchmark"),
    "a word for a number": (edited(lambda document: document["cells"][0].update(median_ms="fast")), "is not the result of a benchmark"),
    "other cells": (edited(lambda document: document["cells"][0].update(batch_size=7)), "(steps with batch size): 1 with 7"),
    "cells that failed": (edited(lambda document: document["cells"][0].update(median_ms=None)), "(steps with batch size): none."),
    "too large": (lambda path: path.write_bytes(bytes(17 << 20)), "it has more than 16777216 bytes"),
    "deep": (lambda path: path.write_bytes(b"[" * 100_000), "levels deep"),
    "a pipe": (lambda path: os.mkfifo(path), "must be a regular file"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_unusable_earlier_result_is_refused_before_anything_is_measured(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, said = UNFIT[name]
    path = tmp_path / "other.json"
    make(path)

    def never(*_: object, **__: object) -> Any:
        raise AssertionError("something was measured")

    monkeypatch.setattr(CellRun, "warm_up", never)
    result = call("digits", "--batch-sizes", "1", "--steps", "1", *QUICK, "--compare", path, "-o", tmp_path / "out.json", code=2)
    assert said in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert not (tmp_path / "out.json").exists()


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("scm_runtime.bench.run.run_bench", None)
    result = call("digits", "-o", tmp_path / "file" / "out.json", code=1)
    assert result.stderr.startswith(f"Error: cannot write '{tmp_path}/file/out.json': ")


# ----------------------------------------------------------------------------
# What goes wrong.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digits", "--batch-sizes", "0"], "at least 1"),
        (["digits", "--batch-sizes", "one"], "must be one or more integers"),
        (["digits", "--batch-sizes", ""], "must hold at least one number"),
        (["digits", "--steps", ""], "must hold at least one number"),
        (["digits", "--steps", "1,7"], "must be one of [1, 2]"),
        (["digits", "--sampler", "heun"], "sampler must be"),
        (["digits", "--seconds", "-1"], "-1"),
        (["digits", "--seconds", "nan"], "must be a number of seconds, got nan"),
        (["digits", "--threads", "0"], "threads must be"),
        (["digits", "--dtype", "fp8"], "dtype must be"),
        (["digits", "--device", "tpu"], "device must be"),
        (["no-such-bundle"], "no-such-bundle"),
    ],
)
def test_arguments_out_of_range(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CellRun, "warm_up", None)  # nothing is measured
    assert said in " ".join(call(*arguments, code=2).stderr.split())


def test_a_cell_that_does_not_fit_leaves_the_others() -> None:
    """A batch of forty thousand digits, in a process limited to 2 GB of memory."""
    program = """
import resource, sys
from scm_runtime.bench import run as bench
from scm_runtime.bench.result import MachinePeak
from scm_runtime.cli import main
bench.measure_cpu_peak = lambda threads: MachinePeak(reason="not here")
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
main(["bench", "digits", "--batch-sizes", sys.argv[1], "--steps", "1", "--seconds", "0", "--threads", "1", "--device", "cpu", *sys.argv[2:]])
"""
    done = run_python(program, "40000,2", "--json")
    large, small = json.loads(done.stdout)["cells"]
    assert "out of memory" in large["error"]
    assert large["median_ms"] is None
    assert large["runs"] == 0
    assert small["error"] is None
    assert small["median_ms"] > 0
    assert done.stderr == ""
    done = run_python(program, "40000", check=False)
    assert done.returncode == 1
    assert "failed: steps 1, batch 40000" in done.stdout
    assert done.stderr == "Error: nothing could be measured: see the failures.\n"


def interrupting(monkeypatch: pytest.MonkeyPatch, method: str, at: int) -> None:
    """Raise KeyboardInterrupt in the call number ``at`` of a method of CellRun."""
    calls = 0
    original = getattr(CellRun, method)

    def interrupted(row: CellRun, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        original(row, *arguments)

    monkeypatch.setattr(CellRun, method, interrupted)


def test_ctrl_c_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ("digits", "--batch-sizes", "1,2", "--steps", "1", *QUICK)
    interrupting(monkeypatch, "measure_round", 2)
    document = measured(*arguments, "--seconds", "inf", "-o", tmp_path / "out.json", code=130)
    assert document["interrupted"] is True
    assert document["seconds"] is None
    assert [cell["median_ms"] is not None for cell in document["cells"]] == [True, False]
    assert json.loads((tmp_path / "out.json").read_text()) == document
    interrupting(monkeypatch, "measure_round", 2)
    result = call(*arguments, code=130)
    assert "not reached" in result.stdout
    assert result.stderr == "Interrupted: the figures are those measured so far\n"
    assert call("digits", "--batch-sizes", "1", "--steps", "1", *QUICK, "--compare", tmp_path / "out.json").exit_code == 0


def test_ctrl_c_before_anything_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    interrupting(monkeypatch, "warm_up", 1)
    result = call("digits", *QUICK, "-o", tmp_path / "out.json", code=130)
    assert result.stdout == ""
    assert result.stderr == "Interrupted\n"
    assert not (tmp_path / "out.json").exists()


def test_samples_that_are_not_finite_fail_their_cell(tmp_path: Path) -> None:
    bundle = toy_bundle.write_text_bundle(tmp_path / "text.scm", gain=float("inf"))
    document = measured(bundle, "--batch-sizes", "1", *QUICK, code=1)
    assert [cell["median_ms"] for cell in document["cells"]] == [None, None]
    assert all("not finite" in cell["error"] for cell in document["cells"])


def test_progress_is_for_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with bench_progress() as progress:
        progress("2 steps, batch 8", 0.5)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with bench_progress() as progress:
        progress("2 steps, batch 8", 0.5)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2 steps, batch 8" in err


# ----------------------------------------------------------------------------
# Documentation.


def test_the_keys_are_those_of_the_documentation(tmp_path: Path) -> None:
    described = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8").partition("## JSON")[2]
    path = tmp_path / "before.json"
    measured("digits", "--batch-sizes", "1", "--steps", "1", *QUICK, "-o", path)
    document = measured("digits", "--batch-sizes", "1", "--steps", "1", *QUICK, "--compare", path)
    names = {*document, *document["cells"][0], *(name for part in ("bundle", "memory", "work", "peak", "comparison") for name in document[part])}
    assert {name for name in names if f"`{name}`" not in described} == set()


def test_the_commands_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^\$ scm-runtime bench (.*)$", (ROOT / "docs" / "bench.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        call(*command.split(), "--seconds", "0")
    assert [path.name for path in tmp_path.iterdir()] == ["before.json"]
