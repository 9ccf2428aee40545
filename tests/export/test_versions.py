"""Package versions that the exporter is known to fail with are refused before anything is read; its table agrees with pyproject.toml."""

from __future__ import annotations

import logging
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from scm_export import cli, export
from scm_export.versions import REQUIREMENTS, TESTED, check_versions
from scm_runtime import MissingDependencyError
from support import BLOCK_IMPORTS, ROOT, run_python

Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Function that makes a package appear to be installed in another version, through metadata that comes first on Python's path."""
    folder = tmp_path / "installed"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def add(name: str, version: str) -> None:
        facts = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        facts.parent.mkdir()
        facts.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    return add


@pytest.mark.parametrize(
    ("installed", "named", "remedy"),
    [
        ({"torch": "2.13.0+cpu", "onnxscript": "0.7.1"}, ["onnxscript 0.7.1 cannot be used with torch 2.13.0+cpu"], "pip install 'onnxscript>=0.7.2'"),
        ({"torch": "2.14.1", "onnxscript": "0.5.4"}, ["onnxscript 0.5.4 cannot be used with torch 2.14.1"], "pip install 'onnxscript>=0.7.2'"),
        ({"torch": "2.9.1"}, ["torch 2.9.1 cannot be used: ", "CVE-2026-24747"], "pip install 'torch>=2.10'"),
        ({"onnx": "1.20.1"}, ["onnx 1.20.1 cannot be used: ", "CVE-2026-34445"], "pip install 'onnx>=1.21'"),
        ({"onnxruntime-gpu": "1.29.0"}, ["onnxruntime-gpu 1.29.0 cannot be used: "], "pip install 'onnxruntime-gpu>=1.30'"),
        ({"onnx": "1.20.1", "onnxscript": "0.6.0"}, ["onnx 1.20.1", "onnxscript 0.6.0"], "pip install 'onnx>=1.21' 'onnxscript>=0.7.2'"),
    ],
)
def test_versions_that_fail_are_refused_before_anything_is_read(
    installed: dict[str, str], named: list[str], remedy: str, install: Install, tmp_path: Path
) -> None:
    for name, version in installed.items():
        install(name, version)
    checkpoint, out = tmp_path / "no-checkpoint.pt", tmp_path / "out.scm"
    with pytest.raises(MissingDependencyError) as caught:
        export(checkpoint, out)
    done = CliRunner(catch_exceptions=False).invoke(cli.main, [str(checkpoint), "-o", str(out)])
    assert done.exit_code == 1
    assert done.stderr == f"Error: {caught.value}\n"
    for part in [*named, remedy]:
        assert part in done.stderr
    assert not out.exists()


def test_they_are_refused_before_torch_is_imported(install: Install, tmp_path: Path) -> None:
    install("onnxscript", "0.6.2")
    program = "sys.path.insert(0, sys.argv[2])\nsys.argv[1:] = ['x.pt']\nfrom scm_export.cli import main\nmain()"
    done = run_python(BLOCK_IMPORTS + program, "torch,onnx,onnxscript,onnxruntime", tmp_path / "installed", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: onnxscript 0.6.2 cannot be used with torch ")


@pytest.mark.parametrize("version", ["0.6.2", "0.7.0"])
def test_an_older_torch_takes_an_older_onnxscript(version: str, install: Install) -> None:
    install("torch", "2.10.0")
    install("onnxscript", version)
    check_versions()


def test_untested_newer_versions_are_warned_about_first(install: Install, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    install("torch", "2.99.0")
    install("onnxscript", "0.99")
    with caplog.at_level(logging.WARNING, "scm_export"), pytest.raises(FileNotFoundError):
        export(tmp_path / "no-checkpoint.pt")
    (message,) = (record.getMessage() for record in caplog.records if record.name == "scm_export")
    assert "torch 2.99.0, onnxscript 0.99: newer than what this exporter has been tested with (torch 2.13, onnxscript 0.7)" in message
    assert "pip install 'torch~=2.13.0' 'onnxscript~=0.7.0'" in message


def test_a_tested_torch_gives_no_warning(install: Install, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    install("torch", "2.13.1+cu130")
    with pytest.raises(FileNotFoundError):
        export(tmp_path / "no-checkpoint.pt")
    assert not [record for record in caplog.records if record.name == "scm_export"]


def parse(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_the_floors_of_pyproject_are_not_below_those_of_the_exporter() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    floors: dict[str, list[str]] = {}
    for line in declared:
        if found := re.match(r"([\w-]+)(?:\[[\w,]+\])?(?:>=|~=)([\d.]+)", line):
            floors.setdefault(found[1], []).append(found[2])
    for needed in REQUIREMENTS:
        for name in needed.distributions or (needed.package,):
            assert floors[name]
            for floor in floors[name]:
                assert parse(floor) >= parse(needed.minimum), name


@pytest.mark.parametrize("name", TESTED)
def test_what_development_installs_is_what_is_tested(name: str) -> None:
    (pin,) = re.findall(rf"^{name}==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin == TESTED[name]
