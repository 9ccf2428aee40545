"""A benchmark's measurement of the machine: the CPU's peak, the graphs that measure a GPU's peak, and the use of memory."""

from __future__ import annotations

import ctypes
import sys
import uuid
from typing import Any

import numpy as np
import onnx
import pytest

from scm_runtime import OutOfMemoryError
from scm_runtime.bench import cpu_peak as bench_peak
from scm_runtime.bench import gpu_peak as bench_gpu_peak
from scm_runtime.bench import machine as bench_machine
from scm_runtime.bench import memory as bench_memory
from scm_runtime.bench.gpu_peak import BLOCK, CHAIN, GRAPHS, copy_rate, matmul_rate
from scm_runtime.bench.result import MachinePeak
from scm_runtime.devices import cuda_driver as driver
from scm_runtime.devices.placement import CPU
from scm_runtime.ort.open_session import open_session

HEADER = '<ir_version: 10, opset_import: ["" : 20]>\n'
TYPES = {"fp32": 1, "fp16": 10, "bf16": 16}
GIB = 2**30


def product_model(dtype: str) -> onnx.ModelProto:
    """Sixteen products in sequence, and one element of the last."""
    chain = "\n".join(f"    x{i + 1} = MatMul(x{i}, x0)" for i in range(CHAIN["product"]))
    return onnx.parser.parse_model(
        HEADER
        + f"""product (float[{BLOCK},{BLOCK}] block, int64[2] repeats) => (float[1,1] corner) {{
    whole = Tile(block, repeats)
    x0 = Cast<to={TYPES[dtype]}>(whole)
{chain}
    start = Constant<value_ints=[0, 0]>()
    end = Constant<value_ints=[1, 1]>()
    first = Slice(x{CHAIN["product"]}, start, end)
    corner = Cast<to=1>(first)
}}"""
    )


def copy_model() -> onnx.ModelProto:
    """Negations in sequence, and one element of the last."""
    chain = "\n".join(f"    x{i + 1} = Neg(x{i})" for i in range(CHAIN["copy"]))
    return onnx.parser.parse_model(
        HEADER
        + f"""copy (float[{BLOCK}] block, int64[1] repeats) => (float[1] corner) {{
    x0 = Tile(block, repeats)
{chain}
    start = Constant<value_ints=[0]>()
    end = Constant<value_ints=[1]>()
    corner = Slice(x{CHAIN["copy"]}, start, end)
}}"""
    )


def test_the_graphs_are_those_described() -> None:
    assert sorted(path.name for path in GRAPHS.iterdir()) == ["copy.onnx", "product.bf16.onnx", "product.fp16.onnx", "product.fp32.onnx"]
    assert onnx.load(GRAPHS / "copy.onnx") == copy_model()
    for dtype in TYPES:
        assert onnx.load(GRAPHS / f"product.{dtype}.onnx") == product_model(dtype)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_products_neither_grow_nor_vanish(dtype: str) -> None:
    orthogonal = np.array(np.linalg.qr(np.random.default_rng(0).standard_normal((BLOCK, BLOCK)))[0])
    repeats = 3
    corner = open_session(GRAPHS / f"product.{dtype}.onnx")(block=(orthogonal / repeats).astype(np.float32), repeats=np.array([repeats, repeats]))
    expected = np.linalg.matrix_power(orthogonal, CHAIN["product"] + 1)[0, 0] / repeats
    np.testing.assert_allclose(corner, expected, atol=1e-6 if dtype == "fp32" else 1e-3)


def test_the_graphs_have_rates() -> None:
    """The graphs run on the CPU too, although bench does not use them there."""
    assert 0 < matmul_rate(CPU, "fp32", 2 * BLOCK) < 1e15
    assert 0 < copy_rate(CPU, 1 << 20) < 1e15


def test_a_gpus_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on the CPU, and with an out-of-memory error."""
    monkeypatch.setattr(bench_gpu_peak, "SIZE", {"fp32": 2 * BLOCK})
    monkeypatch.setattr(bench_gpu_peak, "COPIED_BYTES", 1 << 20)
    peak = bench_machine.measure_gpu_peak(CPU, "fp32")
    assert peak.reason is None
    assert peak.matmul_gflops
    assert peak.copy_gb_per_second
    assert peak.how.startswith("fp32 product 128 x 128 and negation of 1 MB")

    def full(*_: object) -> float:
        raise OutOfMemoryError("the device is full")

    monkeypatch.setattr(bench_gpu_peak, "copy_rate", full)
    assert bench_machine.measure_gpu_peak(CPU, "fp32") == MachinePeak(reason="the device is full")


def test_the_cpu_has_rates_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench_peak.measure_in_subprocess(1)
    assert 0.1 < float(found["matmul_gflops"]) < 1e6
    assert 0.01 < float(found["copy_gb_per_second"]) < 1e5
    assert str(found["library"]).startswith(f"numpy {np.__version__}")


def test_a_failing_process_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    program = tmp_path / "program.py"
    monkeypatch.setattr(bench_peak, "__file__", str(program))
    for text, said in (("import no_such_module", "no_such_module"), ("print('no JSON')", "its process failed"), ("raise SystemExit(3)", "ended with 3")):
        program.write_text(text)
        with pytest.raises(OSError, match=said):
            bench_peak.measure_in_subprocess(1)
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(OSError, match="which Python"):
        bench_peak.measure_in_subprocess(1)


def test_rates_follow_from_the_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def half_a_second(work: Any, items: Any) -> float:
        done.append(len(items))
        for item in items:
            work(item)
        return 0.5

    monkeypatch.setattr(bench_peak, "_fastest", half_a_second)
    monkeypatch.setattr(bench_peak, "_seconds", lambda run: 0.01)  # of one product
    monkeypatch.setattr(bench_peak, "COPIED_BYTES", 4_000_000)
    assert bench_peak.matmul_rate(10, 3) == 3 * 2 * 2 * 10**3 / 0.5
    assert bench_peak.copy_rate(3) == 2 * 4_000_000 / 0.5
    assert done == [3, 3]


# ----------------------------------------------------------------------------
# Memory.


def test_the_process_has_memory() -> None:
    now, most = bench_memory.resident_bytes(), bench_memory.peak_bytes()
    assert most is not None
    assert 2**20 < most < 2**45
    if now is not None:
        assert now <= most
    held = np.ones(64 << 20, np.uint8)
    after = bench_memory.peak_bytes()
    assert after is not None
    assert after >= (now or 0) + held.nbytes // 2


class Driver:
    """Fake libcuda and libnvidia-ml, with one GPU whose used memory the test sets."""

    identity = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")

    def __init__(self, used: int) -> None:
        self.used, self.asked = used, list[bytes]()

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, handle: Any, index: int) -> int:
        return 0 if index == 1 else 101

    def cuDeviceGetUuid_v2(self, identity: Any, handle: Any) -> int:
        identity.raw = self.identity.bytes
        return 0

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, identity: bytes, handle: Any) -> int:
        self.asked.append(identity)
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.used = self.used
        return 0


def test_a_gpus_memory_growth_is_its_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Driver(3 * GIB)
    monkeypatch.setattr(bench_memory, "load_nvml", lambda: machine)
    monkeypatch.setattr(driver, "load_library", lambda: machine)
    memory = bench_memory.DeviceMemory(1)
    assert machine.asked == [b"GPU-01234567-89ab-cdef-0123-456789abcdef"]
    for used, growth in ((5 * GIB, 2 * GIB), (9 * GIB, 6 * GIB), (4 * GIB, 6 * GIB)):
        machine.used = used
        memory.update()
        assert memory.growth == growth
    unknown = bench_memory.DeviceMemory(0)  # the fake driver knows device 1 only
    unknown.update()
    assert unknown.growth is None


def test_a_missing_driver_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise OSError("libnvidia-ml.so.1: no such file")

    monkeypatch.setattr(bench_memory, "load_nvml", none)
    for index in (None, 0):
        memory = bench_memory.DeviceMemory(index)
        memory.update()
        assert memory.growth is None
    monkeypatch.setattr(bench_memory, "load_nvml", lambda: ctypes.CDLL(None))  # a library without the functions
    assert bench_memory.DeviceMemory(0).growth is None
