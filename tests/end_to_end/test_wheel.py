"""The wheel, in a new environment that has never seen torch, draws digits."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import BLOCK_IMPORTS, ROOT, run

# Nothing of this environment may leak into the new one.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT], cwd=folder)
    (path,) = folder.glob("scm_runtime-*.whl")
    return path


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new virtual environment with the wheel and its extra [cpu]."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run([sys.executable, "-m", "venv", folder], env=ENVIRONMENT)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    run([scripts / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}[cpu]"], env=ENVIRONMENT)
    return scripts


def test_contents(wheel: Path) -> None:
    """The two packages as they lie here, nothing else, for any platform."""
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    packages = {"scm_runtime": ROOT, "scm_export": ROOT / "export"}
    here = {
        path.relative_to(parent).as_posix()
        for package, parent in packages.items()
        for path in (parent / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == here
    assert {"scm_runtime/py.typed", "scm_export/py.typed", "scm_runtime/bundles/digits.scm/scm.json"} <= inside


def test_torch_is_not_there(programs: Path) -> None:
    listed = run([programs / "python", "-m", "pip", "list", "--format=freeze"], env=ENVIRONMENT).stdout
    names = {line.split("==")[0].lower().replace("_", "-") for line in listed.splitlines()}
    assert {"scm-runtime", "onnxruntime", "numpy"} <= names
    assert not {"torch", "onnx", "onnxscript", "onnx-ir"} & names


def test_command_line(programs: Path, tmp_path: Path) -> None:
    out = tmp_path / "digits.png"
    done = run([programs / "scm-runtime", "generate", "digits", "--labels", "0,1,2,3,4,5", "--seed", "0", "-o", out], env=ENVIRONMENT, cwd=tmp_path)
    assert done.stdout.startswith(f"wrote {out} (6 samples, seeds 0…5, 2 steps")
    with Image.open(out) as image:
        assert image.size == (3 * 28, 2 * 28)
        sheet = np.asarray(image)
    cells = sheet.reshape(2, 28, 3, 28).swapaxes(1, 2).reshape(6, 28, 28).astype(float)
    assert all(cell.std() > 30 for cell in cells), "each cell must hold bright strokes on black"
    assert all(cell[[0, -1]].mean() < cell[4:24, 4:24].mean() for cell in cells), "in its middle"
    run([programs / "scm-runtime", "smoke", "digits"], env=ENVIRONMENT, cwd=tmp_path)


def test_from_python(programs: Path, tmp_path: Path) -> None:
    """README's lines, with every import of torch, onnx and scm_export forbidden."""
    program = """
from importlib.util import find_spec
from scm_runtime import Generator

with Generator("digits") as generate:
    out = generate(class_labels=[3, 1, 4], seed=7)
    assert out.seeds == (7, 8, 9)
    assert [image.size for image in out.images] == [(28, 28)] * 3
    assert (out.array == generate(["three", "one", "four"], seed=7).array).all()
    out.save("digits.png")
loaded = Block.names & {name.split(".")[0] for name in sys.modules}
assert not loaded, loaded
sys.meta_path.remove(Block)
assert not any(find_spec(name) for name in ("torch", "onnx", "onnxscript")), "installed"
"""
    run([programs / "python", "-c", BLOCK_IMPORTS + program, "torch,onnx,onnxscript,scm_export"], env=ENVIRONMENT, cwd=tmp_path)
    assert (tmp_path / "digits.png").is_file()


def test_exporting_says_what_is_missing(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "digits.pt").touch()
    done = run([programs / "scm-export", "digits.pt"], env=ENVIRONMENT, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "pip install 'scm-runtime[export,cpu]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert run([programs / "scm-export", "--help"], env=ENVIRONMENT).stdout.startswith("Usage: ")
