"""Drivers, devices and moments that do not suit: each is a typed error with a remedy, or a fallback that is logged."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from scm_runtime import DeviceError, Generator, InvalidArgumentError, NativeOpsError
from stub.recording import Recording, driver, new_stream

IMAGE = (28, 28, 1)
OUT_OF_MEMORY, SYSTEM_NOT_READY = 2, 802  # of CUresult

# What a user's program does; it prints the type and the text of an error, or what is known about a result.
PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
import scm_runtime
try:
    with scm_runtime.Generator("digits", device=sys.argv[1], **eval(sys.argv[2])) as generate:
        print(generate(class_labels=3, seed=1).array.shape, generate.info.device, generate.info.native_ops, generate.info.native_ops_reason)
except scm_runtime.ScmError as error:
    print(type(error).__name__, error)
"""


def run(device: str = "cuda", options: str = "{}", **variables: str) -> str:
    """Run the program in a process of its own, which sees a stub with these variables. Returns what it prints."""
    environment = {**os.environ, "SCM_CACHE_DIR": "", "SCM_STUB_LOG": "", **{f"SCM_STUB_{name}": value for name, value in variables.items()}}
    command = [sys.executable, "-P", "-c", PROGRAM, device, options]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout


@contextmanager
def failing(function: str, error: int, times: int = 1) -> Iterator[None]:
    """Let the next calls of a function of the driver fail with an error."""
    driver().scm_stub_fail(function.encode(), error, times)
    try:
        yield
    finally:
        driver().scm_stub_fail(function.encode(), 0, 0)


def on_gpu(**options: Any) -> Generator:
    return Generator("digits", device="cuda", **options)


# ----------------------------------------------------------------------------
# The driver and the device.


def test_a_driver_that_is_older_than_onnxruntime_s_cuda() -> None:
    printed = run(DRIVER="12080")
    assert "DeviceError" in printed
    assert "driver is too old: it supports CUDA up to 12.8" in printed
    assert "Install the driver in version 580 or newer" in printed


def test_device_auto_is_the_cpu_with_an_old_driver() -> None:
    printed = run("auto", DRIVER="12080")
    assert "INFO device 'auto' is the CPU: the NVIDIA driver is too old" in printed
    assert f"{(1, *IMAGE)} cpu" in printed


def test_a_driver_that_does_not_start() -> None:
    with failing("cuInit", SYSTEM_NOT_READY, times=1000), pytest.raises(DeviceError, match="nvidia-fabricmanager"):
        on_gpu()


@pytest.mark.parametrize("device", ["t4", "a100"])
def test_a_device_older_than_the_native_library(device: str) -> None:
    printed = run(DEVICE=device)
    assert "INFO the function bodies run instead of the native kernels" in printed
    assert f"{(1, *IMAGE)} cuda:0 False" in printed
    assert "has kernels for compute capability 9.0, and" in printed
    assert "Build it there" in printed


def test_a_device_newer_than_a_native_library_without_ptx() -> None:
    printed = run(DEVICE="rtx5090")
    assert f"{(1, *IMAGE)} cuda:0 False" in printed
    assert "has kernels for compute capability 9.0, and NVIDIA GeForce RTX 5090 has 12.0" in printed


def test_native_ops_true_requires_kernels_for_the_device() -> None:
    printed = run(options="{'native_ops': True}", DEVICE="b200")
    assert f"{NativeOpsError.__name__} native_ops=True, but" in printed
    assert "NVIDIA B200 has 10.0" in printed


def test_a_device_that_onnxruntime_has_no_code_for() -> None:
    printed = run(DEVICE="v100")
    assert "DeviceError" in printed
    assert "Tesla V100-SXM2-16GB 7.0" in printed
    assert "device='cpu'" in printed


def test_a_device_that_onnxruntime_lacks_machine_code_for() -> None:
    """CUDA 13 supports it, and the build of ONNX Runtime does not."""
    printed = run(DEVICE="b200")
    assert "DeviceError" in printed
    assert "no kernel image is available" in printed
    assert "device='cpu'" in printed


def test_a_device_that_is_too_small_for_the_weights() -> None:
    printed = run(MEMORY=str(4 << 20))
    assert "OutOfMemoryError" in printed


def test_a_stream_of_another_device() -> None:
    with pytest.raises(InvalidArgumentError, match=r"a stream of cuda:1\. Pass device='cuda:1'"):
        on_gpu(stream=new_stream(1))


# ----------------------------------------------------------------------------
# Captures that fail.


@pytest.mark.parametrize("function", ["cuGraphInstantiateWithFlags", "cuStreamBeginCapture_v2"])
def test_no_memory_for_a_graph_costs_that_shape_only(function: str, recording: Recording, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), on_gpu() as generate:
        with failing(function, OUT_OF_MEMORY):
            assert generate(class_labels=3, seed=1).array.shape == (1, *IMAGE)
        assert "without a CUDA graph" in caplog.text
        assert "out of memory" in caplog.text.lower().replace("_", " ")
        assert generate(class_labels=3, seed=1).array.shape == (1, *IMAGE)
        for _ in range(2):
            recording.restart()
            assert generate(class_labels=[3] * 4, seed=1).array.shape == (4, *IMAGE)
        assert recording.graph_launches() > 0, "another shape is still captured"


@pytest.mark.stub_faults("UNSAFE")
def test_a_capture_that_is_invalidated_once_is_repeated(recording: Recording) -> None:
    with on_gpu() as generate:
        with failing("cuStreamEndCapture", 901):
            assert generate(class_labels=3, seed=1).array.shape == (1, *IMAGE)
        recording.restart()
        generate(class_labels=3, seed=1)
    assert recording.graph_launches()


def test_captures_that_always_fail_are_given_up(recording: Recording, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), on_gpu() as generate, failing("cuStreamEndCapture", 901, times=1000):
        for n in (1, 2, 1, 2):
            assert generate(class_labels=[3] * n, seed=1).array.shape == (n, *IMAGE)
        recording.restart()
        for n in (1, 2):
            generate(class_labels=[3] * n, seed=1)
        assert not recording.lines("capture+"), "a capture that cannot succeed is not repeated at each call"
        assert generate.warmup(batch_sizes=(1, 2)) == ()
    for what in ("calls run", "'noise.onnx' runs", "'step.fp16.onnx' runs", "'finite.onnx' runs", "'decode.fp16.onnx' runs"):
        assert f"{what} without a CUDA graph" in caplog.text


def test_another_thread_allocates_during_captures(recording: Recording) -> None:
    """Captures are in CUDA's thread-local mode, which allows that: each batch size is captured."""
    stop, allocated = threading.Event(), []

    def allocate() -> None:
        context, address, cuda = ctypes.c_void_p(), ctypes.c_void_p(), driver()
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
        cuda.cuCtxSetCurrent(context)
        while not stop.wait(0.001):
            if cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(4096)) == 0:
                cuda.cuMemFree_v2(address)
                allocated.append(1)

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        with on_gpu(dtype="fp32") as generate:  # in half precision, the stub's black images would be decoded again
            for n in range(1, 9):
                assert generate(class_labels=[1] * n, seed=0).array.shape == (n, *IMAGE)
            during_captures = len(allocated)
            recording.restart()
            for n in range(1, 9):
                generate(class_labels=[1] * n, seed=0)
            assert recording.graph_launches() == 8
            assert not recording.lines("capture+")
    finally:
        stop.set()
        thread.join()
    assert during_captures


# ----------------------------------------------------------------------------
# Bundles of earlier versions.


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_bundle_exported_before(dtype: Any, recording: Recording) -> None:
    """Its graphs have no fused operators, and compute shapes as they run."""
    bundle = Path(__file__).parents[1] / "golden" / "old.scm"
    with Generator(bundle, device="cuda", dtype=dtype) as generate:
        for n in (1, 3):
            shape = generate(class_labels=[1] * n, seed=1, output_type="np").array.shape
            assert shape == (n, *generate.manifest.output.shape)
        recording.restart()
        generate(class_labels=1, seed=1)
        assert generate.info.native_ops
    assert recording.graph_launches()
