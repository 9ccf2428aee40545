"""Exhausted memory of the host: the error is OutOfMemoryError and names the batch and the remedy, and the Generator stays usable.

Each test runs in a process of its own, whose address space is limited after the libraries are loaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from scm_runtime import Generator, OutOfMemoryError
from scm_runtime.cli.program import describe
from scm_runtime.common.memory import is_out_of_memory
from scm_runtime.engines.host import HostEngine
from support import run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the address space is read from /proc and limited by setrlimit")


RETURNED = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc returns freed blocks to the system, and threads reserve no addresses


def run_limited(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program that limits its memory. glibc aborts a process that has no memory for a thread's own data: then run it again."""
    for _ in range(5):
        done = run_python(program, *arguments, check=False, env={**os.environ, **RETURNED})
        if "thread-local data: ABORT" not in done.stderr:
            break
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


LIMIT = """
import contextlib, itertools, resource, sys
import numpy as np

@contextlib.contextmanager
def room(megabytes):
    "Let this process allocate so many megabytes more."
    pages = int(open("/proc/self/statm").read().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
"""

SAMPLE = (
    LIMIT
    + """
from scm_runtime import Generator, OutOfMemoryError

generator = Generator("digits", device="cpu", cache_dir=False, threads=2, native_ops=NATIVE)
expected = generator(seed=1).array.tobytes()
assert generator.submit(seed=1).result(60).array.tobytes() == expected
error = None
with room(60):
    for size in (2**power for power in range(6, 20)):
        try:
            CALL
        except MemoryError as raised:
            error = raised
            break
assert generator(seed=1).array.tobytes() == generator.submit(seed=1).result(60).array.tobytes() == expected
assert type(error) is OutOfMemoryError, repr(error)
print(size)
print(error)
"""
)


@pytest.mark.parametrize("native", ["'auto'", "False"], ids=["kernels", "bodies"])
@pytest.mark.parametrize("call", ["generator(seed=range(size))", "generator.submit(seed=range(size)).result(60)"], ids=["call", "submit"])
def test_a_batch_that_does_not_fit_names_its_size_and_leaves_the_generator_usable(call: str, native: str) -> None:
    printed = run_limited(SAMPLE.replace("CALL", call).replace("NATIVE", native)).stdout
    size, error = printed.split("\n", 1)
    assert f"out of memory for a batch of {size}" in error
    assert "Use a smaller batch." in error
    assert "onnxruntime_src" not in error, "the message names no source files of ONNX Runtime"


def test_a_bundle_that_does_not_fit_names_its_weights() -> None:
    """The room is increased until the bundle opens. No error in between is of another kind."""
    run_limited(
        LIMIT
        + """
from scm_runtime import Generator, OutOfMemoryError

Generator("digits", device="cpu", cache_dir=False, threads=1).close()
errors = []
for megabytes in itertools.count(3, 3):
    try:
        with room(megabytes):
            Generator("digits", device="cpu", cache_dir=False, threads=1).close()
        break
    except OutOfMemoryError as error:
        errors.append(str(error))
assert any("out of memory for the weights of" in error and "memory limit" in error for error in errors), errors
"""
    )


@pytest.mark.parametrize("extension", [".png", ".jpg", ".webp"])
def test_saving_blames_memory_and_not_the_format(extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{extension}"
    run_limited(
        LIMIT
        + """
from scm_runtime import OutOfMemoryError, Samples, Timings

pixels = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), np.uint8)
samples = Samples(array=pixels, seeds=(0, 1, 2, 3), conditioning={}, timings=Timings(noise=0, steps=(0,), decode=0, total=0))
samples.save(sys.argv[1])
before = open(sys.argv[1], "rb").read()
errors = []
for megabytes in range(1, 20):
    try:
        with room(megabytes):
            samples.save(sys.argv[1])
    except OutOfMemoryError as error:
        errors.append(str(error))
    assert open(sys.argv[1], "rb").read() == before
assert errors
assert all("4 images of [256, 256, 3] in one file" in error and "Save fewer images" in error for error in errors), errors
""",
        path,
    )
    assert list(tmp_path.iterdir()) == [path]


def test_onnxruntime_that_does_not_fit_is_not_answered_with_pip_install() -> None:
    printed = run_limited(
        LIMIT
        + """
from scm_runtime import Generator, OutOfMemoryError
from scm_runtime.common.load_onnxruntime import load_onnxruntime

try:
    with room(20):
        load_onnxruntime()
except OutOfMemoryError as error:
    print(error)
assert load_onnxruntime().__version__
"""
    ).stdout
    assert "out of memory for ONNX Runtime" in printed
    assert "pip install" not in printed


def test_a_library_that_cannot_be_mapped_is_told_apart_from_missing_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The dynamic loader says the same if its file system is mounted noexec, and does not name the folder of a library that another one needs."""
    library = tmp_path / "libx.so"
    library.write_bytes(bytes(1 << 20))
    errors = [OSError(f"{name}: failed to map segment from shared object") for name in (library, "libx.so.1")]
    assert [is_out_of_memory(error) for error in errors] == [False, False]
    monkeypatch.setattr("scm_runtime.common.memory.has_room", lambda nbytes: nbytes < 1 << 20)
    assert [is_out_of_memory(error) for error in errors] == [True, True]
    assert not is_out_of_memory(ImportError("libgomp.so.1: cannot allocate memory in static TLS block"))


def test_a_command_that_cannot_load_a_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scm_runtime.common.memory.has_room", lambda _nbytes: False)
    for error in (ImportError("libXau.so.6: failed to map segment from shared object"), MemoryError()):
        message, code = describe(error, click.Command("generate"))
        assert code == 1
        assert message.startswith("Error: out of memory. Use a smaller batch, or raise the memory limit")
    assert "no module x" in describe(ImportError("no module x"), click.Command("generate"))[0]


@pytest.mark.parametrize("method", ["start", "step", "decode", "all_finite"])
def test_an_array_that_does_not_fit_names_the_batch(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("Unable to allocate 9.00 GiB for an array")

    with Generator("digits", device="cpu", threads=1) as generator:
        with monkeypatch.context() as patch:
            patch.setattr(HostEngine, method, fail)
            for call in (generator, lambda **arguments: generator.submit(**arguments).result(60)):
                with pytest.raises(OutOfMemoryError, match=r"out of memory for a batch of 3\. Use a smaller batch\. \(Unable to allocate 9\.00 GiB"):
                    call(seed=[1, 2, 3])
        assert len(generator(seed=[1, 2, 3])) == 3


def test_a_memory_error_of_a_callback_is_raised_as_it_is() -> None:
    def fail(*_: object) -> None:
        raise MemoryError("of the user")

    with Generator("digits", device="cpu", threads=1) as generator, pytest.raises(MemoryError, match=r"^of the user$"):
        generator(seed=1, callback_on_step_end=fail)
