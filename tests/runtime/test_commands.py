"""Every command of ``scm-runtime`` works with the embedded bundle. `make floors` runs these tests without torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from scm_export.cli import main as export
from scm_runtime.cli import main


def call(*arguments: str | Path) -> str:
    """Run a command and return its standard output."""
    done = CliRunner(catch_exceptions=False).invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_help(name: str) -> None:
    assert f"{name} [OPTIONS]" in call(name, "--help")


def test_the_exporter_has_help_without_its_packages() -> None:
    done = CliRunner(catch_exceptions=False).invoke(export, ["--help"])
    assert done.exit_code == 0, done.output
    assert "[OPTIONS] CHECKPOINT" in done.stdout


def test_digits_are_drawn(tmp_path: Path) -> None:
    out = tmp_path / "digits.png"
    call("generate", "digits", "--labels", "3,1", "--seed", "7", "-o", out)
    with Image.open(out) as image:
        assert image.size == (56, 28)


def test_what_is_printed_of_a_bundle() -> None:
    assert "digits" in call("inspect", "digits")
    assert json.loads(call("inspect", "digits", "--json"))["name"] == "digits"


def test_the_embedded_bundle_passes_its_checks() -> None:
    call("smoke", "digits")


def test_this_machine_can_sample() -> None:
    assert json.loads(call("doctor", "--json"))["works"] is True


def test_a_wrong_argument_is_a_usage_error() -> None:
    done = CliRunner(catch_exceptions=False).invoke(main, ["generate", "digits", "--seed", "x"])
    assert done.exit_code == 2
    assert "must be one or more integers" in done.stderr
