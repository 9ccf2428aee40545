"""The wheel, installed into a new environment without PyTorch, generates digits: built with the native library, and without it for lack of a compiler."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import toy_bundle
import toy_text
from scm_runtime.ort.native_ops import BUILD_INFO, LIBRARY
from support import BLOCK_IMPORTS, ROOT, run

# No variable of this environment may leak into the new one. Building without CUDA is faster.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "SCM_"))} | {"SCM_OPS_CUDA": "OFF"}
NO_COMPILER = ENVIRONMENT | {"CC": "/nonexistent", "CXX": "/nonexistent"}
NATIVE = {f"scm_runtime/_native/{name}" for name in (LIBRARY, BUILD_INFO)}


def build(folder: Path, env: dict[str, str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Build a wheel from this checkout in a folder, which also receives the compiled files."""
    pip: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    return run([*pip, "--wheel-dir", folder, "--config-settings", f"build-dir={folder / 'build'}", ROOT], cwd=folder, env=env, check=check)


def create_environment(folder: Path, *requirements: str | Path) -> Path:
    """Create a virtual environment and install requirements into it with pip. Returns its folder of programs."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], env=ENVIRONMENT)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", scripts / "python"]
    run([*pip, "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt", *requirements], env=ENVIRONMENT)
    return scripts


def site_packages(programs: Path) -> Path:
    return Path(run([programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"], env=ENVIRONMENT).stdout.strip())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with the native library. The build fails if the library cannot be built."""
    folder = tmp_path_factory.mktemp("wheel")
    build(folder, ENVIRONMENT | {"SCM_REQUIRE_OPS": "1"})
    (path,) = folder.glob("scm_runtime-*.whl")
    return path


@pytest.fixture(scope="module")
def plain_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without the native library, built without a compiler."""
    folder = tmp_path_factory.mktemp("plain-wheel")
    build(folder, NO_COMPILER)
    (path,) = folder.glob("scm_runtime-*.whl")
    return path


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment with the wheel and its extras [cpu,text]."""
    return create_environment(tmp_path_factory.mktemp("environment") / "venv", f"{wheel}[cpu,text]")


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}


def test_contents(wheel: Path, plain_wheel: Path) -> None:
    """A wheel contains the two packages of this checkout and the native library, which makes it platform-specific but not Python-specific."""
    packages = {"scm_runtime": ROOT, "scm_export": ROOT / "export"}
    here = {
        path.relative_to(parent).as_posix()
        for package, parent in packages.items()
        for path in (parent / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"scm_runtime/py.typed", "scm_export/py.typed", "scm_runtime/bundles/digits.scm/scm.json"} <= here
    assert contents(plain_wheel) == here
    assert contents(wheel) == here | NATIVE
    assert plain_wheel.name.endswith("-py3-none-any.whl")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")


def test_the_library_exports_one_symbol_and_needs_only_system_libraries(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract(f"scm_runtime/_native/{LIBRARY}", tmp_path)
    ctypes.CDLL(library).RegisterCustomOps  # noqa: B018 - raises if the symbol is missing
    if shutil.which("readelf"):
        listed = run(["readelf", "--dyn-syms", "--wide", library]).stdout.splitlines()
        defined = [line.split() for line in listed if len(line.split()) == 8 and line.split()[4] in ("GLOBAL", "WEAK", "UNIQUE") and line.split()[6] != "UND"]
        assert [fields[7] for fields in defined] == ["RegisterCustomOps"]
        needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", run(["readelf", "--dynamic", "--wide", library]).stdout))
        assert all(re.match(r"(libc|libm|libdl|libpthread|librt|ld-linux.*)\.so", name) for name in needed), needed


def test_a_required_library_that_cannot_be_built(tmp_path: Path) -> None:
    done = build(tmp_path, NO_COMPILER | {"SCM_REQUIRE_OPS": "1"}, check=False)
    assert done.returncode != 0
    assert "SCM_REQUIRE_OPS is set, and the native library in cpp_ops/ could not be built" in done.stdout + done.stderr
    assert "/nonexistent" in done.stdout + done.stderr, "the output must contain the reason"
    assert not list(tmp_path.glob("*.whl"))


def test_kernels_and_function_bodies_give_the_same_images(programs: Path, tmp_path: Path) -> None:
    program = """
import numpy as np
from scm_runtime import Generator

pixels = []
for native_ops in (True, False):
    with Generator("digits", native_ops=native_ops) as generate:
        assert generate.info.native_ops is native_ops, generate.info
        pixels.append(generate(seed=range(20), output_type="np").array.astype(int))
off = np.abs(pixels[0] - pixels[1])
assert off.max() <= 1 and (off > 0).mean() <= 1e-3, (off.max(), (off > 0).mean())
assert Generator("digits").info.native_ops
"""
    run([programs / "python", "-c", program], env=ENVIRONMENT, cwd=tmp_path)


def test_without_the_library(plain_wheel: Path, programs: Path, tmp_path: Path) -> None:
    scripts = create_environment(tmp_path / "venv", "--no-deps", plain_wheel)
    # The dependencies come from the first environment, which this line puts behind the packages of this one in sys.path.
    (site_packages(scripts) / "others.pth").write_text(str(site_packages(programs)))
    run([scripts / "scm-runtime", "generate", "digits", "--seed", "0", "-o", "digit.png"], env=ENVIRONMENT, cwd=tmp_path)
    assert (tmp_path / "digit.png").is_file()
    done = run([scripts / "scm-runtime", "smoke", "digits"], env=ENVIRONMENT, cwd=tmp_path)
    assert "function bodies, no native kernels: this installation has no _native/" in done.stdout
    refused = run([scripts / "scm-runtime", "smoke", "digits", "--native-ops"], env=ENVIRONMENT, cwd=tmp_path, check=False)
    assert refused.returncode == 1
    assert "SCM_REQUIRE_OPS=1" in refused.stderr


def test_torch_and_onnx_are_not_installed(programs: Path) -> None:
    listed = run([sys.executable, "-m", "pip", "--python", programs / "python", "list", "--format=freeze"], env=ENVIRONMENT).stdout
    names = {line.split("==")[0].lower().replace("_", "-") for line in listed.splitlines()}
    assert {"scm-runtime", "onnxruntime", "numpy"} <= names
    assert not {"torch", "transformers", "onnx", "onnxscript", "onnx-ir"} & names


def test_command_line(programs: Path, tmp_path: Path) -> None:
    out = tmp_path / "digits.png"
    done = run([programs / "scm-runtime", "generate", "digits", "--labels", "0,1,2,3,4,5", "--seed", "0", "-o", out], env=ENVIRONMENT, cwd=tmp_path)
    assert done.stdout.startswith(f"wrote {out} (6 samples, seeds 0…5, 2 steps")
    with Image.open(out) as image:
        assert image.size == (3 * 28, 2 * 28)
        sheet = np.asarray(image)
    cells = sheet.reshape(2, 28, 3, 28).swapaxes(1, 2).reshape(6, 28, 28).astype(float)
    assert all(cell.std() > 30 for cell in cells), "each cell must hold bright strokes on black"
    assert all(cell[[0, -1]].mean() < cell[4:24, 4:24].mean() for cell in cells), "with the strokes in the middle"
    run([programs / "scm-runtime", "smoke", "digits"], env=ENVIRONMENT, cwd=tmp_path)


def test_images_of_prompts(programs: Path, tmp_path: Path) -> None:
    bundle = toy_text.write_prompt_bundle(tmp_path / "text.scm")
    program = """
from scm_runtime import Generator

with Generator(sys.argv[2]) as generate:
    out = generate(prompt=["a cat", "a dog"], seed=7)
    out.images[1].save("dog.png")
loaded = Block.names & {name.split(".")[0] for name in sys.modules}
assert not loaded, loaded
"""
    run([programs / "python", "-c", BLOCK_IMPORTS + program, "torch,transformers,onnx,onnxscript,scm_export", bundle], env=ENVIRONMENT, cwd=tmp_path)
    with Image.open(tmp_path / "dog.png") as image:
        np.testing.assert_array_equal(np.asarray(image), toy_bundle.decode(toy_text.sample([8], ["a dog"]))[0])


def test_from_python(programs: Path, tmp_path: Path) -> None:
    """Run the example of README. Every import of torch, onnx, onnxscript or scm_export fails."""
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


def test_scm_export_without_its_extra_names_the_pip_command(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "digits.pt").touch()
    done = run([programs / "scm-export", "digits.pt"], env=ENVIRONMENT, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "pip install 'onnxruntime>=" in done.stderr
    assert "'torch>=" in done.stderr
    assert "Traceback" not in done.stderr
    assert run([programs / "scm-export", "--help"], env=ENVIRONMENT).stdout.startswith("Usage: ")


def test_plain_onnxruntime_gives_the_same_images(programs: Path, tmp_path: Path) -> None:
    """The sample-2 graph in an InferenceSession, in a process that cannot import scm_runtime, gives the same pixels as Generator."""
    bundle = site_packages(programs) / "scm_runtime" / "bundles" / "digits.scm"
    plain = """
import numpy as np, onnxruntime

session = onnxruntime.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])
np.save("plain.npy", session.run(None, {"seeds": np.arange(20), "class_labels": np.arange(20) % 10})[0])
"""
    run([programs / "python", "-c", BLOCK_IMPORTS + plain, "scm_runtime,scm_export,torch,onnx", bundle / "sample-2.fp32.onnx"], env=ENVIRONMENT, cwd=tmp_path)
    generator = "import numpy as np; from scm_runtime import Generator; np.save('generator.npy', Generator('digits', native_ops=False)(seed=range(20)).array)"
    run([programs / "python", "-c", generator], env=ENVIRONMENT, cwd=tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "plain.npy"), np.load(tmp_path / "generator.npy"))
