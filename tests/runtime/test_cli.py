"""``scm-runtime`` on the command line: what it writes, prints and exits with. Bad input is in tests/test_bad_input.py."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import scm_runtime
from scm_runtime import Generator, Manifest
from scm_runtime.cli import main
from scm_runtime.samples import grid
from support import run, tree


def call(*arguments: str | Path) -> Result:
    """The command line in this process; an exception other than SystemExit fails the test."""
    return CliRunner(catch_exceptions=False).invoke(main, [str(argument) for argument in arguments])


def command(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "scm_runtime.cli", *arguments]


def test_generate(tiny: Generator, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "grid.png"
    result = call("generate", tiny_bundle, "-o", out, "--labels", "cat,0, dog", "--seed", "7")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(rf"wrote {re.escape(str(out))} \(3 samples, seeds 7…9, 2 steps, \d+ ms\)\n", result.stdout)
    with Image.open(out) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(grid(tiny([2, 0, 3], seed=7, output_type="np").array)))


def test_generate_options(tiny: Generator, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    for options, expected, columns in (
        (["--seed", "5,-2", "--steps", "1"], tiny(seed=[5, -2], num_inference_steps=1), None),
        (["--seed", "5", "--labels", "bee", "--batch-size", "3", "--columns", "1", "--threads", "1"], tiny(1, seed=5, batch_size=3), 1),
        (["--seed", "5", "--labels", "1"], tiny(1, seed=5), None),
    ):
        result = call("generate", tiny_bundle, "-o", out, *options)
        assert result.exit_code == 0, result.output
        with Image.open(out) as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(grid(expected.array, columns)))
    assert "(1 sample, seed 5, 2 steps" in result.stdout


def test_inspect(tiny: Generator, tiny_bundle: Path) -> None:
    result = call("inspect", tiny_bundle)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    report = tiny.manifest.verification
    assert report is not None
    for fragment in (
        "tiny",
        "edm2",
        "float32 [N, 3, 8, 8]",
        "uint8 [N, 8, 8, 3]",
        "4 classes: ant, bee, cat, dog",
        "→ 1.1 → 0",
        "Apache-2.0",
        f"{len(report.cases)} cases against {report.reference} on cpu; worst max abs error",
    ):
        assert fragment in text
    assert all(name in text for name in tiny.manifest.files)


def test_inspect_json(tiny: Generator, tiny_bundle: Path) -> None:
    result = call("inspect", tiny_bundle, "--json")
    assert result.exit_code == 0, result.output
    assert msgspec.json.decode(result.stdout, type=Manifest) == tiny.manifest


def test_smoke(tiny_bundle: Path) -> None:
    result = call("smoke", tiny_bundle, "--threads", "1")
    assert result.exit_code == 0, result.output
    assert "NO" not in result.stdout
    assert result.stdout.count("yes") == 6  # three checks, one and two steps
    assert result.stdout.count(" ms") == 5  # loading, and a latency for batch 1 and 4 with one and two steps


def test_smoke_tells_of_a_bundle_that_is_not_deterministic(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = Generator.__call__, iter(range(10_000))

    def unsteady(self: Generator, *arguments: object, **keywords: object) -> object:
        samples = original(self, *arguments, **keywords)  # type: ignore[arg-type]
        if samples.array.dtype == np.float32:
            samples.array[...] += 1e-3 * next(calls)
        return samples

    monkeypatch.setattr(Generator, "__call__", unsteady)
    result = call("smoke", tiny_bundle)
    assert result.exit_code == 1
    assert "NO" in result.stdout
    assert "Export it again" in result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["inspect", "--help"], ["smoke", "--help"]], ids=" ".join)
def test_help(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")


def test_version() -> None:
    result = call("--version")
    assert result.exit_code == 0
    assert scm_runtime.__version__ in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["nonsense"],
        ["generate"],
        ["generate", "digits"],
        ["generate", "digits", "-o", "x.png", "--wide"],
        ["inspect"],
        ["smoke", "digits", "--threads", "two"],
    ],
    ids=" ".join,
)
def test_usage(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert "Usage: " in result.stderr
    assert "--help" in result.stderr


def test_a_real_process(tiny_bundle: Path, tmp_path: Path) -> None:
    """Exit codes and streams once more, as a shell sees them."""
    good = run(command("generate", tiny_bundle, "-o", tmp_path / "one.png", "--seed", "1"))
    assert (good.stderr, good.stdout.startswith("wrote ")) == ("", True)
    bad_label: list[str | Path] = ["-o", tmp_path / "x.png", "--labels", "4"]
    bad_ending: list[str | Path] = ["-o", tmp_path / "x.xyz"]
    for arguments, code in ((bad_label, 2), (bad_ending, 2)):
        bad = run(command("generate", tiny_bundle, *arguments), check=False)
        assert (bad.returncode, bad.stdout) == (code, "")
        assert bad.stderr.startswith("Error: ")
        assert "Traceback" not in bad.stderr
    assert sorted(tree(tmp_path)) == ["one.png"]


def test_an_interrupt_leaves_nothing_half_written(tiny_bundle: Path, tmp_path: Path) -> None:
    """Ctrl-C while it writes: the program stops in the middle of the file and waits for the signal."""
    program = """
import signal, sys, time
from scm_runtime import cli, samples

def slow(*_):
    print("writing", flush=True)
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)
samples.Path.replace = slow
cli.main()
"""
    out = tmp_path / "grid.png"
    out.write_bytes(b"before")
    with subprocess.Popen(
        [sys.executable, "-c", program, "generate", str(tiny_bundle), "-o", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            assert len(tree(tmp_path)) == 2, "the picture in the making"
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert time.monotonic() - start < 20
    assert process.returncode == 1
    assert "Traceback" not in stderr
    assert "Aborted" in stderr
    assert tree(tmp_path) == {"grid.png": b"before"}
