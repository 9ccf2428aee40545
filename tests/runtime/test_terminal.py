"""The command lines with standard streams that are full, closed, limited to ASCII, or whose reader has gone; and with hostile text from files."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner

import scm_export
import scm_runtime
from scm_export import cli as export_cli
from scm_runtime import BundleError
from scm_runtime.bundle.manifest import read_manifest
from scm_runtime.cli import commands, main
from scm_runtime.cli.flag_names import with_flag_names
from support import run, run_python

LICENCE = "freie Lizenz für Zürich"
COMMANDS = {
    "help": ["scm-runtime", "generate", "--help"],
    "inspect": ["scm-runtime", "inspect", "{bundle}"],
    "inspect --json": ["scm-runtime", "inspect", "{bundle}", "--json"],
    "doctor": ["scm-runtime", "doctor"],
    "generate": ["scm-runtime", "generate", "{bundle}", "-o", "{folder}/…→.png"],
    "generate --json": ["scm-runtime", "generate", "{bundle}", "-o", "{folder}/…→.png", "--json"],
    "smoke": ["scm-runtime", "smoke", "{bundle}"],
    "bench": ["scm-runtime", "bench", "{bundle}", "--seconds", "0", "--steps", "1", "--batch-sizes", "1"],
    "export --dry-run": ["scm-export", "{checkpoint}", "-o", "{folder}/dry.scm", "--dry-run"],
    "export --help": ["scm-export", "--help"],
}

FAULTS = {"full": (1, "Error: cannot write the output: No space left on device"), "closed": (0, ""), "ascii": (0, ""), "pipe": (141, "")}
CASES = sorted(((fault, name) for fault in FAULTS for name in COMMANDS), key=lambda case: case[1].startswith("export"))

# Runs each command in a forked child, so that Python and the packages start once.
PROGRAM = """
import json, os, sys, tempfile
from scm_export.cli import main as export
from scm_runtime.bench import run
from scm_runtime.cli import main as runtime

run.measure_cpu_peak = lambda threads: run.MachinePeak(reason="takes a second")
results = []
for fault, (program, *arguments) in json.loads(sys.argv[1]):
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    if program == "scm-export":
        import scm_export.exporter  # after the children that do not need torch
    child = os.fork()
    if not child:
        os.dup2(err.fileno(), 2)
        sys.stderr = open(2, "w", encoding="ascii" if fault == "ascii" else "utf-8", closefd=False)
        if fault == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        elif fault == "pipe":
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 1)
        else:
            os.dup2(out.fileno(), 1)
        sys.stdout = open(1, "w", encoding="ascii" if fault == "ascii" else "utf-8", closefd=False)
        if fault == "closed":
            os.close(1)
            sys.stdout = None
        sys.exit((runtime if program == "scm-runtime" else export)(arguments, prog_name=program))
    _, status = os.waitpid(child, 0)
    out.seek(0), err.seek(0)
    results.append((os.waitstatus_to_exitcode(status), out.read().decode(), err.read().decode()))
print(json.dumps(results))
"""

Results = dict[tuple[str, str], tuple[int, str, str]]


@pytest.fixture(scope="module")
def results(tiny_bundle: Path, small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Exit code, standard output and standard error of each command, by the fault of standard output and the name of the command."""
    folder = tmp_path_factory.mktemp("terminal")
    bundle = folder / "tiny.scm"
    shutil.copytree(tiny_bundle, bundle)
    (bundle / "scm.json").write_bytes(msgspec.structs.replace(read_manifest(bundle), licence=LICENCE).to_json())
    filled = [(fault, [part.format(bundle=bundle, checkpoint=small_checkpoint, folder=folder) for part in COMMANDS[name]]) for fault, name in CASES]
    return dict(zip(CASES, json.loads(run_python(PROGRAM, json.dumps(filled)).stdout), strict=True))


@pytest.mark.parametrize(("fault", "name"), CASES)
def test_every_command_ends_without_a_traceback(fault: str, name: str, results: Results) -> None:
    code, stdout, stderr = results[fault, name]
    expected, message = FAULTS[fault]
    assert code == expected, stderr
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr
    lines = stderr.splitlines()
    assert (lines[-1:] if name.startswith("export") else lines) == [message] * bool(message) or (name.startswith("export") and not message), stderr
    if fault == "ascii":
        assert stdout.strip()
        assert stdout.isascii()
        assert stderr.isascii()


def test_text_that_is_not_ascii_is_written_in_ascii(results: Results) -> None:
    inspected, generated = results["ascii", "inspect"][1], results["ascii", "generate"][1]
    assert "freie Lizenz f\\xfcr Z\\xfcrich" in inspected
    assert "-> 1.1 -> 0" in inspected
    assert json.loads(results["ascii", "inspect --json"][1])["licence"] == LICENCE
    assert json.loads(results["ascii", "generate --json"][1])["out"].endswith("/…→.png")
    assert re.match(r"wrote .*/\.\.\.->\.png \(1 sample", generated)


def test_in_a_shell(tmp_path: Path) -> None:
    """The faults as a shell makes them, with nothing set up by Python."""
    command = f"{sys.executable} -m scm_runtime"
    for script, expected in (
        (f"{command} inspect digits > /dev/full", (1, "", "Error: cannot write the output: No space left on device\n")),
        (f"{command} inspect digits >&- 2>&-", (0, "", "")),
        (f"{command} generate digits -o {tmp_path}/a.png <&- >&- 2>&-", (0, "", "")),
        (f"{command} inspect nothing 2> /dev/full", (2, "", "")),
        (f"set -o pipefail; {command} inspect digits | true", (141, "", "")),
        (f"PYTHONIOENCODING=ascii {command} inspect nothing-→", (2, "", None)),
    ):
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, done.stdout, done.stderr if expected[2] is not None else None) == expected, done
        assert "Traceback" not in done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------
# Errors of our own, and text from files.


@pytest.mark.parametrize(("package", "program"), [(scm_runtime, main), (scm_export, export_cli.main)], ids=["scm-runtime", "scm-export"])
def test_the_packages_run_as_modules_and_have_short_help(package: Any, program: click.Command) -> None:
    done = run([sys.executable, "-m", package.__name__, "-h"])
    assert done.stdout.startswith(f"Usage: {package.__name__.replace('_', '-')} [OPTIONS]")
    for name in getattr(program, "commands", ()):
        assert CliRunner(catch_exceptions=False).invoke(program, [name, "-h"]).stdout.startswith("Usage: ")


def test_an_error_of_our_own_is_short_and_debug_shows_where(monkeypatch: pytest.MonkeyPatch, small_checkpoint: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LookupError("a bug\x1b[31m")

    monkeypatch.setattr("scm_runtime.bundle.location.resolve_bundle", fail)
    monkeypatch.setattr(export_cli, "_run", fail)
    for program, arguments in ((main, ["inspect", "digits"]), (export_cli.main, [str(small_checkpoint)])):
        result = CliRunner(catch_exceptions=False).invoke(program, arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: internal error: LookupError: a bug\\x1b[31m\n")
        assert "report it" in result.stderr
        assert "scm-runtime doctor" in result.stderr
        assert "Traceback" not in result.stderr
        for with_debug in ([*arguments, "--debug"], ["--debug", *arguments]):
            result = CliRunner(catch_exceptions=False).invoke(program, with_debug)
            assert result.exit_code == 1
            assert "Traceback" in result.stderr
            assert "in fail" in result.stderr


def test_debug_shows_the_traceback_of_a_user_error_too() -> None:
    result = CliRunner(catch_exceptions=False).invoke(main, ["inspect", "nothing", "--debug"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "\nError: " in result.stderr


def test_control_characters_of_files_do_not_reach_the_terminal(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "\x1b]0;title\x07\x1b[2J" + "x" * 5000
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    manifest = read_manifest(bundle)
    labels = tuple(msgspec.structs.replace(item, label_names=(hostile, "b", "c", "d")) for item in manifest.conditioning)
    source = msgspec.structs.replace(manifest.source, file=hostile, weights=hostile)
    changed = msgspec.structs.replace(manifest, producer=hostile, licence=hostile, conditioning=labels, source=source)
    (bundle / "scm.json").write_bytes(changed.to_json())
    result = CliRunner(catch_exceptions=False).invoke(main, ["inspect", str(bundle)])
    assert result.exit_code == 0, result.output
    assert "\\x1b]0;title" in "".join(result.stdout.split())
    assert not set(result.stdout) & {"\x1b", "\x07"}
    assert result.stdout.count("x") < 2000

    def fail(*_: object) -> None:
        raise BundleError(f"a bundle with {hostile}")

    monkeypatch.setattr("scm_runtime.bundle.location.resolve_bundle", fail)
    result = CliRunner(catch_exceptions=False).invoke(main, ["inspect", str(bundle)])
    assert not set(result.stderr) & {"\x1b", "\x07"}


def test_control_characters_in_log_lines_do_not_reach_the_terminal() -> None:
    program = """
import logging
from scm_runtime.cli import commands, main

commands.print_json = lambda document: logging.getLogger("scm_runtime").warning("a name: %s", "\\x1b[2J")
main(["inspect", "digits", "--json"])
"""
    assert run_python(program).stderr == "a name: \\x1b[2J\n"


@pytest.mark.parametrize(
    ("command", "message", "shown"),
    [
        ("generate", "num_inference_steps must be one of [1, 2]; got 3. Or give timesteps.", "--steps must be one of [1, 2]; got 3. Or give --timesteps."),
        ("generate", "threads must be at least 1, or None for one per core, got 0", "--threads must be at least 1, got 0"),
        ("generate", "device='cuda:3' is not available: a device", "--device cuda:3 is not available: a device"),
        ("generate", "all must be for one batch size, got class_labels: 2, seed: 3", "all must be for one batch size, got --labels: 2, --seed: 3"),
        ("generate", "native_ops=True, but the seed of prompt_embeds", "--native-ops, but the seed of prompt_embeds"),
        ("generate", "native_ops=False", "--no-native-ops"),
        ("generate", "out.png cannot be written", "out.png cannot be written"),
        ("generate", "out of memory for a batch of 8", "out of memory for a batch of 8"),
        ("generate", "cannot read 'a/batch_size/seed.npz': it isn't a file", "cannot read 'a/batch_size/seed.npz': it isn't a file"),
        ("inspect", "num_inference_steps must be 1", "num_inference_steps must be 1"),
    ],
)
def test_messages_name_flags(command: str, message: str, shown: str) -> None:
    assert with_flag_names(message, commands.main.commands[command]) == shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "3"], "--steps must be one of [1, 2], the counts this bundle has times for; got 3. For others give --timesteps, decreasing from 1.56455."),
        (["--threads", "0"], "--threads must be an integer from 1 to 1024, got 0"),
        (["--labels", "77"], "--labels must be from 0 to 9, got 77"),
        (["--labels", "1,2", "--seed", "1,2,3"], "got --labels: 2, --seed: 3"),
    ],
)
def test_errors_name_the_flags_that_were_given(options: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner(catch_exceptions=False).invoke(main, ["generate", "digits", "-o", str(tmp_path / "a.png"), *options])
    assert result.exit_code == 2
    assert said in result.stderr


def test_the_times_that_inspect_prints_can_be_given_back(tmp_path: Path) -> None:
    printed = CliRunner(catch_exceptions=False).invoke(main, ["inspect", "digits"]).stdout
    line = next(line for line in printed.splitlines() if "times, 2 steps" in line)
    times = line.removeprefix("times, 2 steps").split("→")
    arguments = ["--timesteps", ",".join(time.strip() for time in times[:-1]), "--seed", "1"]
    assert CliRunner(catch_exceptions=False).invoke(main, ["generate", "digits", "-o", str(tmp_path / "a.png"), *arguments]).exit_code == 0


@pytest.mark.parametrize("arguments", [["bench", "digits", "--seconds", "0", "--steps", "1", "--batch-sizes", "1"], ["smoke", "digits"], ["inspect", "digits"]])
def test_narrow_terminals_get_lists(arguments: list[str]) -> None:
    result = CliRunner(catch_exceptions=False).invoke(main, arguments, env={"COLUMNS": "40"})
    assert result.exit_code == 0, result.output
    assert "━" not in result.stdout
    for name in {"bench": ("images/s", "median ms", "runs"), "smoke": ("finite", "deterministic"), "inspect": ("step.fp32.onnx",)}[arguments[0]]:
        assert name in result.stdout


def test_json_of_generate_and_smoke(tmp_path: Path) -> None:
    def document(*arguments: str) -> Any:
        result = CliRunner(catch_exceptions=False).invoke(main, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    one = document("generate", "digits", "-o", str(tmp_path / "a.png"), "--labels", "3,1", "--seed", "7")
    assert (one["files"], one["seeds"], one["class_labels"], one["evaluations"]) == ([str(tmp_path / "a.png")], [7, 8], [3, 1], 2)
    many = document("generate", "digits", "-o", f"{tmp_path}/{{index}}.png", "--num-images", "3", "--batch-size", "2", "--seed", "4")
    assert many["files"] == [f"{tmp_path}/{index}.png" for index in range(3)]
    assert (many["seeds"], many["class_labels"]) == ([4, 5, 6], [4, 5, 6])
    smoke = document("smoke", "digits")
    assert smoke["passed"] is True
    assert [row["steps"] for row in smoke["results"]] == [1, 2]
    assert all(row["finite"] and row["deterministic"] and row["independent"] and row["contrast"] for row in smoke["results"])


@pytest.mark.parametrize("program", ["scm_runtime", "scm_export"])
@pytest.mark.parametrize("package", ["click", "numpy", "onnxruntime", "torch"])
def test_ctrl_c_while_a_package_is_imported(program: str, package: str, tmp_path: Path) -> None:
    if package == "torch" and program == "scm_runtime":
        pytest.skip("scm_runtime never imports torch")
    code = """
import importlib, sys, time

class Pause:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == package:
            print("importing", flush=True)
            try:
                time.sleep(600)
            except KeyboardInterrupt as error:
                raise ImportError("as from an extension module that is interrupted") from error

_, program, package, *arguments = sys.argv
sys.meta_path.insert(0, Pause)
module = importlib.import_module(f"{program}.__main__")
sys.argv = [program, *arguments]
module.main()
"""
    arguments = ["generate", "digits", "-o", str(tmp_path / "a.png")] if program == "scm_runtime" else ["missing.pt", "-o", str(tmp_path / "a.scm")]
    command = [sys.executable, "-c", code, program, package, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "importing\n"
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, stderr
    assert stderr.startswith(("Interrupted", "starting\nInterrupted")), stderr
    assert "Traceback" not in stderr
