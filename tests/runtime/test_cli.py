"""``scm-runtime`` on the command line: what it writes, prints and exits with. Bad input is in tests/test_bad_input.py."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

import scm_runtime
import toy_bundle
from scm_runtime import Generator, Manifest, Samples
from scm_runtime.bundle.manifest import OutputSpec
from scm_runtime.cli import main
from scm_runtime.cli.smoke import _check
from scm_runtime.engines.engine import Trajectory
from scm_runtime.engines.host import HostEngine
from scm_runtime.samples import grid
from support import run, tree


def call(*arguments: str | Path) -> Result:
    """Run the command in this process; an exception other than SystemExit fails the test."""
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


def opened(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def expect_images(expected: NDArray[np.uint8], paths: list[Path]) -> None:
    """Compare images up to one level: the order of summation may depend on the batch."""
    for image, path in zip(expected, paths, strict=True):
        np.testing.assert_allclose(opened(path).astype(int), image, atol=1)


@pytest.mark.parametrize(
    ("out", "names"),
    [
        ("new/", ["000007.png", "000008.png", "000009.png", "000010.png", "000011.png"]),
        ("new/{index}_{seed:04d}.png", ["0_0007.png", "1_0008.png", "2_0009.png", "3_0010.png", "4_0011.png"]),
    ],
)
def test_one_file_per_image(out: str, names: list[str], tiny: Generator, tiny_bundle: Path, tmp_path: Path) -> None:
    """Seeds are consecutive over all batches, labels are repeated, and batches do not show."""
    result = call("generate", tiny_bundle, "-o", f"{tmp_path}/{out}", "--num-images", "5", "--batch-size", "2", "--labels", "cat,0", "--seed", "7")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(rf"wrote {re.escape(f'{tmp_path}/{out}')} \(5 samples, seeds 7…11, 2 steps, \d+ ms\)\n", result.stdout)
    assert result.stderr == ""
    assert sorted(tree(tmp_path / "new")) == names
    expect_images(tiny([2, 0, 2, 0, 2], seed=7, output_type="np").array, [tmp_path / "new" / name for name in names])


def test_a_grid_of_many_images(tiny: Generator, tiny_bundle: Path, tmp_path: Path) -> None:
    for options, expected in (
        (["--seed", "7", "--labels", "bee"], tiny(1, seed=7, batch_size=5, output_type="np")),
        (["--seed", "9,-4,0,3,9"], tiny(seed=[9, -4, 0, 3, 9], output_type="np")),
    ):
        result = call("generate", tiny_bundle, "-o", tmp_path / "grid.png", "--num-images", "5", "--batch-size", "3", *options)
        assert result.exit_code == 0, result.output
        expect_images(np.asarray(grid(expected.array))[None], [tmp_path / "grid.png"])


def test_one_batch_with_one_file_per_image(tiny: Generator, tiny_bundle: Path, tmp_path: Path) -> None:
    result = call("generate", tiny_bundle, "-o", f"{tmp_path}/{{index}}.png", "--seed", "4,4", "--labels", "0,1")
    assert result.exit_code == 0, result.output
    expect_images(tiny([0, 1], seed=[4, 4], output_type="np").array, [tmp_path / "0.png", tmp_path / "1.png"])


def test_braces_written_twice_are_braces(tiny_bundle: Path, tmp_path: Path) -> None:
    for out, name in (("{{a}}.png", "{a}.png"), ("{}x/", "{}x/000003.png"), ("{{{seed}.png", "{3.png")):
        result = call("generate", tiny_bundle, "-o", f"{tmp_path}/{out}", "--seed", "3")
        assert result.exit_code == 0, result.output
        assert (tmp_path / name).is_file()


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("{index!s:.1}.png", "a field has a format that is not for integers"),
        ("{seed:c}.png", "a field has a format that is not for integers"),
        ("{a}.png", "there is no field {a}"),
        ("{.png", "there is no field"),
        ("pictures", "write 'pictures/' for a folder with one file per image"),
    ],
)
def test_names_that_cannot_be(out: str, said: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("generate", tiny_bundle, "-o", out, "--seed", "3")
    assert result.exit_code == 2
    assert said in result.output
    assert not list(tmp_path.iterdir())


def test_images_are_written_as_they_are_drawn(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = Generator.stream, []

    def watched(self: Generator, *arguments: Any, **keywords: Any) -> Iterator[Samples]:
        for samples in original(self, *arguments, **keywords):
            yield samples
            seen.append(len(tree(tmp_path)))

    monkeypatch.setattr(Generator, "stream", watched)
    assert call("generate", tiny_bundle, "-o", f"{tmp_path}/", "--num-images", "5", "--batch-size", "2", "--seed", "0").exit_code == 0
    assert seen == [2, 4, 5]


def test_no_more_images_than_a_batch_are_computed_at_a_time(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, sizes = HostEngine.step, []

    def watched(self: HostEngine, trajectories: Sequence[Trajectory]) -> None:
        sizes.append(sum(map(len, trajectories)))
        original(self, trajectories)

    monkeypatch.setattr(HostEngine, "step", watched)
    assert call("generate", tiny_bundle, "-o", f"{tmp_path}/", "--num-images", "5", "--batch-size", "2").exit_code == 0
    assert sizes == [2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("a.png", ["--num-images", "2", "--labels", "0,1,2"], "one for each of the 2, got 3"),
        ("a.png", ["--num-images", "3", "--seed", "0,1"], "one for each of the 3, got 2"),
        ("a.png", ["--num-images", "2", "--seed", str(2**63 - 1)], f"got {2**63}"),
        ("a.png", ["--num-images", "2", "--batch-size", "0"], "--batch-size must be an integer of at least 1, got 0"),
        ("a.png", ["--num-images", "0"], "--num-images"),
        ("a.png", ["--labels", "0,1", "--batch-size", "3"], "got --labels: 2, --batch-size: 3"),
        ("{seed}.png", ["--seed", "1,1"], "put {index} into the name"),
        ("{seed}.png", ["--columns", "2"], "leave --columns out"),
        ("{seed}{label}.png", [], "there is no field {label}"),
        ("{seed.real}.png", [], "there is no field {seed.real}"),
        ("{index:s}.png", [], "a field has a format that is not for integers"),
        ("{seed}.xyz", [], "unknown picture format '.xyz'"),
        ("", [], "is a folder"),
        ("a.png", ["--timeout", "0"], "0.0 is not in the range x>0"),
        ("a.png", ["--timeout", "nan"], "--timeout must be a number of seconds above 0, got nan"),
        ("a.png", ["--device", "tpu"], "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
        ("a.png", ["--dtype", "fp8"], "one of this bundle's, fp32; got 'fp8'"),
    ],
)
def test_what_does_not_fit(out: str, options: list[str], message: str, tiny_bundle: Path, tmp_path: Path) -> None:
    result = call("generate", tiny_bundle, "-o", tmp_path / out, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("more", [(), ("--num-images", "3")])
def test_a_timeout_ends_the_command_during_a_step(more: tuple[str, ...], tmp_path: Path) -> None:
    bundle = toy_bundle.write_text_bundle(tmp_path / "slow.scm", graphs={"step": toy_bundle.SLOW_STEP})
    np.save(tmp_path / "embeds.npy", np.ones((2, toy_bundle.WIDTH), np.float32))
    slow = ["--prompt-embeds", str(tmp_path / "embeds.npy"), "--guidance-scale", str(toy_bundle.SLOW_GUIDANCE), "--threads", "1"]
    result = call("generate", bundle, "-o", tmp_path / "a.png", *slow, *more, "--timeout", "0.3")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: not finished within timeout=0.3 seconds.")
    assert not (tmp_path / "a.png").exists()


def test_a_device_that_is_not_there(tiny_bundle: Path, tmp_path: Path) -> None:
    generate: list[str | Path] = ["generate", tiny_bundle, "-o", tmp_path / "a.png"]
    for arguments in (generate, ["smoke", tiny_bundle]):
        result = call(*arguments, "--device", "cuda:99")
        assert result.exit_code == 1
        assert "cuda:99" in result.stderr
    assert tree(tmp_path) == {}


def test_the_device_and_the_dtype_that_every_bundle_has(tiny: Generator, tiny_bundle: Path, tmp_path: Path) -> None:
    result = call("generate", tiny_bundle, "-o", tmp_path / "a.png", "--seed", "3", "--device", "cpu", "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(opened(tmp_path / "a.png"), tiny(seed=3, output_type="np").array[0])
    assert "on cpu" in call("smoke", tiny_bundle, "--device", "cpu").stdout


def on_a_terminal(*arguments: str | Path) -> str:
    """Return what a command prints if stdout and stderr are a terminal."""
    ours, its = os.openpty()
    with subprocess.Popen(command(*arguments), stdout=its, stderr=its, env={**os.environ, "TERM": "xterm", "COLUMNS": "80"}) as process:
        os.close(its)
        said = b""
        try:
            while piece := os.read(ours, 4096):
                said += piece
        except OSError:  # on Linux, when the other side is closed
            pass
        os.close(ours)
    assert process.returncode == 0, said
    return said.decode()


def test_a_bar_shows_progress_on_a_terminal_only(tiny_bundle: Path, tmp_path: Path) -> None:
    one: list[str | Path] = ["generate", tiny_bundle, "-o", tmp_path / "grid.png"]
    many = [*one, "--num-images", "6", "--batch-size", "2"]
    assert "6/6" in on_a_terminal(*many)
    assert "━" not in on_a_terminal(*one)
    assert run(command(*many)).stderr == ""


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
    assert result.stdout.count("yes") == 8  # four checks, one and two steps
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


@pytest.mark.parametrize("level", [0, 255, 77])
@pytest.mark.parametrize("sample", range(4))
def test_smoke_fails_on_an_image_of_one_color(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, level: int, sample: int) -> None:
    original = Generator.__call__

    def paint(self: Generator, *arguments: object, **keywords: object) -> object:
        samples = original(self, *arguments, **keywords)  # type: ignore[arg-type]
        if samples.array.dtype == np.uint8 and len(samples.array) > sample:
            samples.array[sample] = level
        return samples

    monkeypatch.setattr(Generator, "__call__", paint)
    result = call("smoke", tiny_bundle, "--json")
    assert result.exit_code == 1
    document = msgspec.json.decode(result.stdout)
    assert document["passed"] is False
    assert [row["contrast"] for row in document["results"]] == [False, False]
    assert all(row["finite"] and row["deterministic"] for row in document["results"])
    assert "see the failed checks" in result.stderr


@pytest.mark.parametrize(
    ("kind", "shape", "contrast"),
    [("image", (2, 2, 1), False), ("image", (1, 1, 3), True), ("image", (1, 1, 1), True), ("latent", (4, 2, 2), False), ("latent", (1,), True)],
)
def test_smoke_looks_for_contrast_between_pixels(kind: Literal["image", "latent"], shape: tuple[int, ...], contrast: bool) -> None:
    def constant(seeds: Sequence[int], output_type: str) -> Any:
        return SimpleNamespace(array=np.full((len(seeds), *shape), 77, np.uint8 if kind == "image" else np.float32))

    assert _check(constant, "fp32", OutputSpec(kind=kind, shape=shape)) == (True, True, True, contrast)


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["inspect", "--help"], ["smoke", "--help"], ["bench", "--help"]], ids=" ".join)
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
    """Exit codes and streams, as a shell sees them."""
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
    """Ctrl-C during writing: the program pauses in the middle of the file and waits for the signal."""
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
            assert len(tree(tmp_path)) == 2, "the unfinished file"
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert time.monotonic() - start < 20
    assert process.returncode == 130
    assert stderr == "Interrupted: nothing was written\n"
    assert tree(tmp_path) == {"grid.png": b"before"}


def test_an_interrupt_among_many_images_keeps_those_that_are_there(tiny_bundle: Path, tmp_path: Path) -> None:
    program = "import signal; from scm_runtime.cli import main; signal.signal(signal.SIGINT, signal.default_int_handler); main()"
    out = f"{tmp_path}/{{index}}.png"
    arguments = ["generate", str(tiny_bundle), "-o", out, "--num-images", "1000000", "--seed", "0"]
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "9.png").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, stdout) == (130, "")
    message = re.fullmatch(rf"Interrupted: (\d+) of 1000000 images are in '{re.escape(out)}'\n", stderr)
    assert message, stderr
    files = sorted(tmp_path.iterdir())
    assert len(files) - int(message[1]) in (0, 1), "the interrupt may come between writing a file and counting it"
    for file in files:
        assert opened(file).shape == (8, 8, 3)
