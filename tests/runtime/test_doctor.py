"""``scm-runtime doctor`` reports which parts of an installation work, even if some are missing or broken."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from scm_runtime.cli import main
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.doctor import examine as doctor
from support import BLOCK_IMPORTS, ROOT, run_python

CPU = "CPUExecutionProvider"
RUN = "from scm_runtime.cli import main; main(['doctor', '--json'])"


def call(*arguments: str) -> tuple[int, str]:
    """Run the command in this process and return its exit code and stdout; an exception other than SystemExit fails the test."""
    result = CliRunner(catch_exceptions=False).invoke(main, ["doctor", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout


def report() -> tuple[int, dict[str, Any]]:
    """Run ``doctor --json`` and return its exit code and the document."""
    code, text = call("--json")
    return code, json.loads(text)


def provider(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in document["providers"] if entry["name"] == name)


def test_a_working_installation() -> None:
    code, document = report()
    assert code == 0
    assert document["works"] is True
    assert provider(document, CPU)["works"] is True
    assert provider(document, CPU)["milliseconds"] > 0
    assert document["versions"]["onnxruntime"] == load_onnxruntime().__version__
    assert document["threads"]["available"] >= 1
    code, text = call()
    assert code == 0
    assert f"{CPU} can sample here." in " ".join(text.split())


def test_every_json_key_is_documented() -> None:
    _, document = report()
    described = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8").partition("## JSON")[2]
    keys = {*document, *document["cuda"], *document["native_ops"], *document["cache"], *document["threads"], *document["providers"][0]}
    assert {key for key in keys if f"`{key}`" not in described} == set()


def test_wrong_pixels_are_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Image.open(doctor.GOLDEN) as image:
        golden = np.array(image)
    for image_data, works in (
        (golden, True),
        (np.where(golden < 250, golden + 2, golden), True),
        (np.where(golden < 250, golden + 3, golden), False),
        (golden[:, :-28], False),
    ):
        path = tmp_path / "golden.png"
        Image.fromarray(image_data.astype(np.uint8)).save(path)
        monkeypatch.setattr(doctor, "GOLDEN", path)
        code, document = report()
        assert provider(document, CPU)["works"] is works
        assert (code, document["works"]) == (0 if works else 1, works)
        assert any(CPU in problem["what"] for problem in document["problems"]) is not works
    path.write_bytes(b"not an image")
    code, text = call()
    assert code == 1
    assert "cannot be read" in text
    assert "Nothing here can sample" in text


def test_a_provider_that_runs_no_nodes_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    azure = "AzureExecutionProvider"
    if azure not in load_onnxruntime().get_available_providers():
        pytest.skip(f"needs an ONNX Runtime with {azure}, which opens sessions but runs no nodes")
    _, document = report()
    assert provider(document, azure)["works"] is None
    monkeypatch.setattr(doctor, "REMOTE", {})
    code, document = report()
    assert code == 0  # the CPU works
    assert set(provider(document, CPU)["nodes"]) == {CPU}
    assert provider(document, azure)["works"] is False
    assert provider(document, azure)["reason"].endswith(f"nodes of the step graph ran on it, but on {CPU}")
    assert set(provider(document, azure)["nodes"]) == {CPU}


def test_a_provider_that_cannot_be_opened_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_onnxruntime(), "get_available_providers", lambda: ["QNNExecutionProvider", CPU])
    code, document = report()
    assert code == 0
    assert provider(document, "QNNExecutionProvider")["works"] is False
    assert provider(document, "QNNExecutionProvider")["reason"]


def test_onnxruntime_for_cuda_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    from scm_runtime.devices import cuda_driver as driver
    from scm_runtime.devices import placement as devices

    def no_driver() -> object:
        raise OSError("libcuda.so.1: no such file")

    names = ("libcudart.so.99", "libcudnn.so.99")
    monkeypatch.setattr(driver, "load_library", no_driver)
    monkeypatch.setattr(load_onnxruntime(), "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr(devices, "needed_libraries", lambda _provider: names)
    monkeypatch.setattr(doctor, "needed_libraries", lambda _provider: names)
    code, document = report()
    assert code == 0
    assert document["cuda"]["usable"] is False
    assert "there is no NVIDIA driver" in document["cuda"]["reason"]
    assert [library["found"] for library in document["cuda"]["libraries"]] == [False, False]
    assert document["cuda"]["install"] == "pip install 'nvidia-cuda-runtime~=99.0' nvidia-cudnn-cu99"
    assert "there is no NVIDIA driver" in provider(document, "CUDAExecutionProvider")["reason"]
    _, text = call()
    assert "missing: libcudart.so.99, libcudnn.so.99" in text
    assert document["cuda"]["install"] in text


def check_without_onnxruntime(text: str) -> dict[str, Any]:
    """Assert that a JSON report says that ONNX Runtime cannot be used, and return the document."""
    document: dict[str, Any] = json.loads(text)
    assert document["works"] is False
    assert document["providers"] == []
    assert document["problems"][0]["what"] == "ONNX Runtime cannot be used"
    return document


def test_without_onnxruntime() -> None:
    done = run_python(f"{BLOCK_IMPORTS}\nBlock.error = ImportError\n{RUN}", "onnxruntime", check=False)
    assert done.returncode == 1, done.stderr
    assert "pip install 'onnxruntime>=" in check_without_onnxruntime(done.stdout)["problems"][0]["reason"]
    assert done.stderr == ""


def test_a_broken_onnxruntime(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise RuntimeError('incomplete installation')")
    done = run_python(f"import sys; sys.path.insert(0, sys.argv[1])\n{RUN}", tmp_path, check=False)
    assert done.returncode == 1, done.stderr
    reason = check_without_onnxruntime(done.stdout)["problems"][0]["reason"]
    assert "incomplete installation" in reason
    assert "--force-reinstall" in reason


def test_two_onnxruntime_wheels(tmp_path: Path) -> None:
    for name in ("onnxruntime", "onnxruntime_gpu"):
        folder = tmp_path / f"{name}-1.31.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.31.0\n")
    done = run_python(f"import sys; sys.path.insert(0, sys.argv[1])\n{RUN}", tmp_path, check=False)
    assert done.returncode == 1, done.stderr
    document = check_without_onnxruntime(done.stdout)
    assert document["onnxruntime_wheels"] == {"onnxruntime": "1.31.0", "onnxruntime-gpu": "1.31.0"}
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in document["problems"][0]["reason"]


def test_report_of_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder, writable, size, problem in (("", False, 0, False), (tmp_path / "cache", True, 5, False), (tmp_path / "file", False, 0, True)):
        (tmp_path / "cache" / "graphs").mkdir(mode=0o700, parents=True, exist_ok=True)
        (tmp_path / "cache" / "graphs" / "five").write_bytes(b"bytes")
        (tmp_path / "file").touch()
        monkeypatch.setenv("SCM_CACHE_DIR", str(folder))
        code, document = report()
        assert code == 0
        assert document["cache"]["folder"] == (str(folder) or None)
        assert (document["cache"]["writable"], document["cache"]["size_bytes"]) == (writable, size)
        assert any("SCM_CACHE_DIR" in entry["reason"] for entry in document["problems"]) is problem
        text = " ".join(call()[1].split())
        assert ("none: SCM_CACHE_DIR is empty" if not folder else str(folder)) in text


@pytest.mark.skipif(not hasattr(__import__("os"), "sched_setaffinity"), reason=f"{sys.platform} has no CPU affinity")
def test_available_cores_follow_the_cpu_affinity() -> None:
    program = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}}); os.environ['OMP_NUM_THREADS'] = '3'\n{RUN}"
    document = json.loads(run_python(program).stdout)
    assert document["threads"]["available"] == 1
    assert document["threads"]["variables"]["OMP_NUM_THREADS"] == "3"
