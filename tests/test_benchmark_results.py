"""Results of the benchmarks: cells that are written as they are measured, and the tables and plots of docs/benchmarks.md."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # the scripts import one another from there

import _common
import all_scripts
import figures
from _common import Cells
from _figures.aims import aims
from _figures.tables import machine_line, milliseconds

from scm_runtime.ort import native_ops

# ----------------------------------------------------------------------------
# Cells


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of results, a machine and a build."""
    monkeypatch.setattr(_common, "RESULTS", tmp_path / "folder")
    monkeypatch.setattr(_common, "machine", lambda: {"cpu": "one", "numpy": "2.4"})
    monkeypatch.setattr(_common, "build", lambda: "library a, sources b")
    return tmp_path / "folder"


def run(names: str, *, again: bool = False, stop_at: str = "", threads: int = 1) -> str:
    """Measure some cells, as a script does, and return which were measured."""
    measured: list[str] = []

    def measure(name: str) -> dict[str, str]:
        if name == stop_at:
            raise KeyboardInterrupt
        measured.append(name)
        return {"status": "ok", "value": name}

    cells = Cells("script", again=again, threads=threads)
    for name in names:
        cells.measure("rows", name, by=partial(measure, name))
    return "".join(measured)


def stored(folder: Path) -> Any:
    return json.loads((folder / "script.json").read_text())["figures"]


def test_an_interrupted_run_loses_nothing_and_the_next_one_goes_on(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("abc", stop_at="c")
    assert list(stored(folder)["rows"]) == ["a", "b"]
    assert run("abcd") == "cd"
    assert run("abcd") == ""
    assert run("ab", again=True) == "ab"
    assert list(stored(folder)["rows"]) == ["a", "b", "c", "d"]
    assert list(folder.iterdir()) == [folder / "script.json"]


def test_figures_of_another_build_or_setting_are_measured_again_and_stay_until_then(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("ab", threads=2) == "ab"
    assert run("a", threads=1) == "a"
    monkeypatch.setattr(_common, "build", lambda: "library z, sources b")
    assert run("a", threads=1) == "a"
    assert list(stored(folder)["rows"]) == ["a", "b"]
    assert not Cells("script", threads=1).is_current("rows", "b")


def test_figures_of_other_packages_or_machines_are_not_mixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("ab")
    monkeypatch.setattr(_common, "machine", lambda: {"cpu": "one", "numpy": "2.5"})
    assert run("a") == "a"
    assert list(stored(folder)["rows"]) == ["a"]


@pytest.mark.parametrize(("status", "again"), [("ok", False), ("wrong", False), ("failed", False), ("missing", True), ("skipped", True)])
def test_what_depends_on_the_moment_is_tried_again(folder: Path, status: str, again: bool) -> None:
    cells = Cells("script")
    cells.keep("a", figures={"status": status})
    assert cells.is_measured("a") is not again


def test_a_damaged_file_is_replaced_and_a_failing_write_leaves_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "script.json").write_text('{"machine": {')
    assert run("a") == "a"
    before = (folder / "script.json").read_text()
    monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("b")
    assert (folder / "script.json").read_text() == before
    assert list(folder.iterdir()) == [folder / "script.json"]


def test_notes_are_not_cells(folder: Path) -> None:
    cells = Cells("script")
    cells.note("not_measured", "XXL", value="too large")
    assert stored(folder) == {"not_measured": {"XXL": "too large"}}
    assert not cells.is_measured("not_measured", "XXL")
    cells.note("not_measured", "XXL", value=None)
    assert stored(folder) == {"not_measured": {}}


def test_the_build_names_the_library_by_its_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library.so"
    monkeypatch.undo()
    monkeypatch.setattr(native_ops, "find_library", lambda: native_ops.Library(library, None))  # type: ignore[arg-type]  # its description is not read
    found = set()
    for content in (b"one", b"two", b"one"):
        library.write_bytes(content)
        _common.build.cache_clear()
        found.add(_common.build())
    _common.build.cache_clear()
    assert len(found) == 2
    assert len({text.partition(", ")[2] for text in found}) == 1


# ----------------------------------------------------------------------------
# All scripts


def test_scripts_run_until_the_time_is_over_and_one_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    (tmp_path / "good.py").write_text(f"import sys; open({str(log)!r}, 'a').write(f'good {{sys.argv[1:]}}\\n')\n")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)\n")
    wait = f"import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    open({str(log)!r}, 'a').write('interrupted\\n')\n"
    (tmp_path / "long.py").write_text(wait)
    (tmp_path / "figures.py").write_text(f"open({str(log)!r}, 'a').write('figures\\n')\n")
    scripts = (("bad.py",), ("good.py", "--preset", "short"), ("long.py",), ("good.py",))
    monkeypatch.setattr(all_scripts, "FOLDER", tmp_path)
    monkeypatch.setattr(all_scripts, "SERIES", {"short": all_scripts.Series(20, scripts)})
    done = CliRunner().invoke(all_scripts.main, ["short", "--minutes", "0.1"])
    assert log.read_text().splitlines() == ["good ['--preset', 'short']", "interrupted", "figures"]
    assert done.exit_code == 1
    assert "Call it again for the rest: long.py; good.py" in done.output
    assert "failed, as its output says: bad.py" in done.output


def test_every_script_that_measures_on_the_cpu_is_run() -> None:
    others = {"all_scripts", "figures", "paper_model", "autotune", "cuda_calls", "first_gpu"}  # these measure nothing, or need a GPU
    scripts = {path.name for path in (ROOT / "benchmarks").glob("[!_]*.py") if path.stem not in others}
    assert {script[0] for script in all_scripts.SERIES["short"].scripts} == scripts
    assert ("ops.py", "--only", "convolutions") in all_scripts.SERIES["short"].scripts  # ops.py alone does not measure them


def test_ctrl_c_waits_for_the_script_and_stale_tables_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = tmp_path / "ended"
    (tmp_path / "long.py").write_text(f"import time\ntime.sleep(1)\nopen({str(ended)!r}, 'w').close()\n")
    (tmp_path / "figures.py").write_text("raise SystemExit(1)\n")
    monkeypatch.setattr(all_scripts, "FOLDER", tmp_path)
    monkeypatch.setattr(all_scripts, "SERIES", {"short": all_scripts.Series(20, ())})
    done = CliRunner().invoke(all_scripts.main, ["short"])
    assert done.exit_code == 1
    assert "figures.py (failed), so the tables of docs/benchmarks.md are not written" in done.output

    wait, interrupts = subprocess.Popen.wait, [KeyboardInterrupt()]

    def interrupted(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if interrupts:
            raise interrupts.pop()
        return wait(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        all_scripts.run(("long.py",), 60)
    assert ended.exists()


# ----------------------------------------------------------------------------
# The tables and plots of docs/benchmarks.md


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
    (folder / "peers.json").write_text(json.dumps({"machine": machine, "figures": {"roof": {}, "rows": {"XXS, batch 1": {**row, "peers": found}}}}))
    (folder / "teacher.json").write_text(json.dumps({"machine": machine, "figures": {"digits": teacher, "XXL": skipped}}))
    good, fair = dict.fromkeys(FIGURES, (0.25, 0.125)), dict.fromkeys(FIGURES, (0.5, None))
    rows = [{"sampler": "teacher", "through": through, "sets": sets, "figures": shown} for through, sets, shown in (("PyTorch", 1, fair), ("fp32", 3, good))]
    changes = {"fp32": {"recognised": 0.001, "recall": 0.0021}}
    quality = {"samples": 10_000, "real": dict.fromkeys(FIGURES, 0.75), "rows": rows, "export_changes": changes}
    (folder / "quality.json").write_text(json.dumps(quality))
    places = "\n".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->" for name in ("peers", "peers-costs", "aims", "teacher", "quality"))
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
    assert "| EDM2-XXS | 1 | fp32 | PyTorch eager | 150.00 | 1.5 | yes | 200 MB | – | – |" in text
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

    (results / "amd-zen4").mkdir()
    (results / "amd-zen4" / "peers.json").write_text(json.dumps({"machine": {}, "figures": {"roof": {}, "rows": {}}}))  # no row is measured yet
    assert run_figures(results, "--check").exit_code == 0

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


def test_the_dates_of_a_table_are_those_of_its_figures() -> None:
    found = {"a": peer(date="2026-11-25"), "b": peer(date="2026-11-27"), "c": peer("missing") | {"date": "2026-11-30"}}
    rows = {"new": row_of("S", 1, found), "old": {**row_of("S", 8, {"a": peer()}), "date": "2026-11-24"}}
    del rows["new"]["date"]
    result = {"machine": {"cpu": "Some CPU", "python": "3.11.7"}, "figures": {"rows": rows}}
    assert machine_line(result).endswith("; 2026-11-24 to 2026-11-27.")


def row_of(size: str, batch_size: int, peers: dict[str, Any]) -> dict[str, Any]:
    return {"date": "2026-11-30", "size": size, "title": size, "batch_size": batch_size, "steps": 2, "threads": 2, "peers": peers}


def test_aims_compare_with_the_fastest_peer_of_the_precision() -> None:
    ours = {"scm_runtime": peer(), "scm_runtime bf16": peer(times_as_long=0.5) | {"dtype": "bf16"}}
    plain = {"ONNX Runtime, plain export": peer(times_as_long=1.1, peak_bytes=150_000_000)}
    rows = [
        row_of("S", 8, {"scm_runtime": peer(), "PyTorch eager": peer(times_as_long=1.6), "OpenVINO f32": peer(times_as_long=1.29)}),
        row_of("CM", 1, {**ours, **plain, "OpenVINO bf16": peer(times_as_long=0.48) | {"dtype": "bf16"}}),
        row_of("LCM", 1, {**ours, **plain, "scm_runtime": peer("failed")}),
        row_of("XXL", 1, {"scm_runtime": peer(peak_bytes=6_990_000_000), "OpenVINO f32": peer(times_as_long=1.3)}),
    ]
    machine = {"cpu": "AMD EPYC", "cores": 2, "python": "3.11.7"}
    figures = {"roof": {"float32_flop_per_s": 1e11, "bfloat16_flop_per_s": 2e11}, "rows": {str(k): row for k, row in enumerate(rows)}}
    lines = aims({"machine": machine, "figures": figures}).splitlines()
    assert lines[2:10] == [
        "| S | 8 | fp32 | OpenVINO f32 | 1.29 | 1.3 | no | 200 MB | – | – |",
        "| XXL | 1 | fp32 | OpenVINO f32 | 1.30 | 1.3 | yes | 7.0 GB | 6.9 GB | yes |",
        "| CM | 1 | fp32 | ONNX Runtime, plain export | 1.10 | 1.0, then 1.2 | 1.0 | 200 MB | 150 MB | no |",
        "| LCM | 1 | fp32 | – | – | 1.0, then 1.2 | not measured | – | 150 MB | – |",
        "| S | 8 | bf16 | – | – | 0.95 | not measured | – | – | – |",
        "| XXL | 1 | bf16 | – | – | 0.95 | not measured | – | – | – |",
        "| CM | 1 | bf16 | OpenVINO bf16 | 0.96 | 0.95 | yes | 200 MB | – | – |",
        "| LCM | 1 | bf16 | – | – | 0.95 | not measured | 200 MB | – | – |",
    ]
    figures["roof"] = {"float32_flop_per_s": 1e11, "bfloat16_flop_per_s": 1e9}  # a processor without bfloat16 instructions
    assert " bf16 |" not in aims({"machine": machine, "figures": figures})
