"""Modules that importing and using scm_runtime imports, and errors for missing packages. Each test runs a fresh process."""

from __future__ import annotations

import re
import types
from importlib import metadata
from pathlib import Path

import pytest

import scm_runtime
import toy_text
from scm_runtime import MissingDependencyError
from scm_runtime.common import load_onnxruntime as module
from scm_runtime.common.installed import install_extras
from support import BLOCK_IMPORTS, run_python

FORBIDDEN = "torch,onnx,onnxscript,scm_export"


def test_sampling_never_imports_torch_onnx_or_the_exporter(tiny_bundle: Path, tmp_path: Path) -> None:
    program = """
from scm_runtime import Generator

with Generator(sys.argv[2]) as generate:
    out = generate(["cat", "dog"], seed=7, callback_on_step_end=lambda *_: None)
    assert len(out.images) == 2
    out.save(sys.argv[3])
loaded = Block.names & {name.split(".")[0] for name in sys.modules}
assert not loaded, loaded
"""
    run_python(BLOCK_IMPORTS + program, FORBIDDEN, tiny_bundle, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").is_file()


def test_the_command_line_never_imports_them(tiny_bundle: Path, tmp_path: Path) -> None:
    program = """
from scm_runtime import cli

for arguments in (["generate", sys.argv[2], "-o", sys.argv[3]], ["inspect", sys.argv[2]], ["smoke", sys.argv[2]], ["--help"]):
    try:
        cli.main(arguments)
    except SystemExit as end:
        assert end.code == 0, arguments
loaded = Block.names & {name.split(".")[0] for name in sys.modules}
assert not loaded, loaded
"""
    run_python(BLOCK_IMPORTS + program, FORBIDDEN, tiny_bundle, tmp_path / "grid.png")


def test_sampling_from_a_prompt_never_imports_torch_or_transformers(tmp_path: Path) -> None:
    """And prints nothing, also when the process is forked afterwards: tokenizers' threads would."""
    bundle = toy_text.write_prompt_bundle(tmp_path / "text.scm")
    program = """
import os
from scm_runtime import Generator, cli

with Generator(sys.argv[2]) as generate:
    generate(prompt=["a cat", "a dog"] * 8, seed=7).save(sys.argv[3])
    generate.encode_prompt("a lighthouse at dusk")
    if (child := os.fork()) == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
try:
    cli.main(["generate", sys.argv[2], "--prompt", "a cat", "--num-images", "3", "-o", sys.argv[3]])
except SystemExit as end:
    assert end.code == 0
loaded = Block.names & {name.split(".")[0] for name in sys.modules}
assert not loaded, loaded
"""
    done = run_python(BLOCK_IMPORTS + program, f"{FORBIDDEN},transformers,diffusers,huggingface_hub", bundle, tmp_path / "grid.png")
    assert done.stderr == ""
    assert (tmp_path / "grid.png").is_file()


def test_without_tokenizers(tmp_path: Path) -> None:
    bundle = toy_text.write_prompt_bundle(tmp_path / "text.scm")
    program = """
Block.error = ModuleNotFoundError
import numpy as np
from scm_runtime import Generator, MissingDependencyError, cli

with Generator(sys.argv[2]) as generate:
    try:
        generate(prompt="a cat")
    except MissingDependencyError as error:
        assert "a prompt requires the package tokenizers" in str(error), error
        assert "pip install '" in str(error), error
    else:
        raise AssertionError("no error")
    generate.warmup()
    generate(prompt_embeds=np.ones((2, 5), np.float32))
cli.main(["generate", sys.argv[2], "--prompt", "a cat", "-o", sys.argv[3]])
"""
    done = run_python(BLOCK_IMPORTS + program, "tokenizers", bundle, tmp_path / "grid.png", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: a prompt requires the package tokenizers (tokenizers was imported)")
    assert "Traceback" not in done.stderr


def test_the_block_works() -> None:
    """Without it, the two tests above would always pass."""
    failed = run_python(BLOCK_IMPORTS + "import torch.nn", FORBIDDEN, check=False)
    assert failed.returncode == 1
    assert "AssertionError: torch was imported" in failed.stderr


def test_the_import_alone_is_light() -> None:
    program = """
import sys
import scm_runtime

heavy = {"numpy", "msgspec", "onnxruntime", "PIL", "rich", "click", "huggingface_hub", "zipfile"} & set(sys.modules)
assert not heavy, heavy
"""
    run_python(program)


def test_names_that_do_not_exist_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'scm_runtime' has no attribute 'Generater'"):
        scm_runtime.Generater  # type: ignore[attr-defined]  # noqa: B018  # the point of the test
    run_python("import scm_runtime; assert 'Generator' in dir(scm_runtime); from scm_runtime import *; Generator, __version__")


def test_all_is_what_is_visible() -> None:
    values = [getattr(scm_runtime, name) for name in scm_runtime.__all__]  # some are imported when they are first used
    assert None not in values
    visible = {name for name, value in vars(scm_runtime).items() if not name.startswith("_") and not isinstance(value, types.ModuleType)}
    assert set(scm_runtime.__all__) == visible | {"__version__"}
    assert len(set(scm_runtime.__all__)) == len(scm_runtime.__all__)
    assert set(scm_runtime.__all__) <= set(dir(scm_runtime))


def test_errors_are_also_the_builtin_ones() -> None:
    assert issubclass(scm_runtime.BundleNotFoundError, FileNotFoundError)
    assert issubclass(scm_runtime.BundleSchemaError, ValueError)
    assert issubclass(scm_runtime.BundleIntegrityError, ValueError)
    assert issubclass(scm_runtime.HubError, OSError)
    assert issubclass(scm_runtime.HubNotFoundError, FileNotFoundError)
    assert issubclass(scm_runtime.InvalidArgumentError, ValueError)
    assert issubclass(scm_runtime.MissingDependencyError, ImportError)
    assert issubclass(scm_runtime.OutputError, OSError)
    assert issubclass(scm_runtime.InferenceError, RuntimeError)
    assert issubclass(scm_runtime.DeviceError, RuntimeError)
    assert issubclass(scm_runtime.ForkedError, RuntimeError)
    assert issubclass(scm_runtime.GenerationTimeoutError, TimeoutError)
    assert issubclass(scm_runtime.GeneratorClosedError, scm_runtime.InvalidArgumentError)
    assert issubclass(scm_runtime.OutOfMemoryError, MemoryError)
    assert issubclass(scm_runtime.OutOfMemoryError, scm_runtime.InferenceError)
    assert issubclass(scm_runtime.NonFiniteError, ArithmeticError)
    assert issubclass(scm_runtime.NonFiniteError, scm_runtime.InferenceError)
    errors = [value for name in scm_runtime.__all__ if isinstance(value := getattr(scm_runtime, name), type) and issubclass(value, Exception)]
    assert len(errors) == 20
    assert all(issubclass(error, scm_runtime.ScmError) for error in errors)


def test_without_onnxruntime(tiny_bundle: Path, tmp_path: Path) -> None:
    program = """
Block.error = ModuleNotFoundError
from scm_runtime import Generator, MissingDependencyError, cli

try:
    Generator(sys.argv[2])
except ImportError as error:
    assert isinstance(error, MissingDependencyError)
    assert "pip install 'onnxruntime>=" in str(error), error
    assert "onnxruntime was imported" in str(error), error
else:
    raise AssertionError("no error")
cli.main(["generate", sys.argv[2], "-o", sys.argv[3]])
"""
    done = run_python(BLOCK_IMPORTS + program, "onnxruntime", tiny_bundle, tmp_path / "grid.png", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ONNX Runtime cannot be imported")
    assert "pip install 'onnxruntime>=" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "grid.png").exists()


def test_both_builds_of_onnxruntime(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    monkeypatch.setattr(module, "installed_version", lambda distribution: "1.0")
    module.load_onnxruntime.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"both onnxruntime and onnxruntime-gpu are installed") as caught:
        scm_runtime.Generator(tiny_bundle)
    assert isinstance(caught.value, ImportError)
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime>=" in str(caught.value)


def test_the_exporter_without_torch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    program = """
Block.error = ModuleNotFoundError
from scm_export import cli

cli.main([sys.argv[2], "-o", sys.argv[3]])
"""
    done = run_python(BLOCK_IMPORTS + program, "torch", tiny_checkpoint, tmp_path / "tiny.scm", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: torch was imported")
    assert re.search(r"pip install 'onnxruntime>=[0-9.]+' .*'torch>=", done.stderr)
    assert "Traceback" not in done.stderr


def test_commands_that_install_extras_name_packages_of_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["numpy>=1.26", "a[x,y]>=1; extra == 'gpu'", 'b~=2.0; python_version > "3" and extra == "gpu"', "c; extra == 'cpu'"]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    assert install_extras("gpu") == "pip install 'a[x,y]>=1' 'b~=2.0'"
    assert install_extras("cpu", "gpu") == "pip install 'a[x,y]>=1' 'b~=2.0' 'c'"
    monkeypatch.setattr(metadata, "requires", lambda name: None)
    assert install_extras("cpu", "gpu") == "pip install '.[cpu,gpu]' in a clone of scm-runtime"
