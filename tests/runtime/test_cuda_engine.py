"""The CUDA engine on a simulated machine (fake_cuda): it matches the host engine, orders its work, uses one thread, and frees everything."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from runtime.fake_cuda import DIGITS, MANIFEST, PLACEMENT, GraphRun, Machine, call
from runtime.fake_cuda_driver import LEGACY, Capsule, CudaError, Stream
from scm_runtime.bundle.manifest import read_manifest
from scm_runtime.bundle.solver_tables import SolverTables
from scm_runtime.common.runs import CancelScope
from scm_runtime.engines.cuda import shape_cache
from scm_runtime.engines.cuda import stream as cuda
from scm_runtime.engines.cuda.capture_lock import CaptureLock
from scm_runtime.engines.cuda.dlpack import DeviceArray
from scm_runtime.engines.cuda.engine import CudaEngine
from scm_runtime.engines.cuda.open_engine import FINITE, cuda_options, open_cuda_engine
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.engines.engine import Engine, Trajectory
from scm_runtime.engines.host import HostEngine
from scm_runtime.engines.sessions import BundleSessions
from scm_runtime.errors import (
    DeviceError,
    GenerationTimeoutError,
    GeneratorClosedError,
    InferenceError,
    InvalidArgumentError,
    MissingDependencyError,
    OutOfMemoryError,
)
from scm_runtime.inputs.call import Call
from scm_runtime.ort.open_session import open_session
from scm_runtime.ort.options import SessionSettings
from scm_runtime.ort.session import Session

LOOP = {"noise.onnx", "step.fp32.onnx", "finite.onnx", "decode.fp32.onnx"}  # graphs of the sampling loop


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(cuda, "_import_cuda", made.modules)
    return made


@pytest.fixture(scope="module")
def host() -> HostEngine:
    return HostEngine(BundleSessions(DIGITS, MANIFEST, "fp32", lambda path: open_session(path, SessionSettings(threads=1))), "fp32", MANIFEST.initial_scale)


def opened(machine: Machine, stream: object | None = None, *, context: CudaContext | None = None, cuda_graph: bool = True) -> CudaEngine:
    context = context or CudaContext(0, stream)
    return open_cuda_engine(context, DIGITS, MANIFEST, "fp32", SessionSettings(PLACEMENT), cuda_graph=cuda_graph, open_session=machine.open_session)


@pytest.fixture
def engine(machine: Machine) -> Iterator[CudaEngine]:
    made = opened(machine)
    yield made
    made.close()


def step(engine: Engine, *trajectories: Trajectory) -> None:
    engine.step(trajectories)
    for one in trajectories:
        one.evaluations_done += 1


def sampled(engine: Engine, trajectory: Trajectory) -> NDArray[Any]:
    """Run a call from noise to pixels."""

    def job() -> NDArray[Any]:
        engine.start(trajectory)
        while not trajectory.done:
            step(engine, trajectory)
        assert engine.finite_flags(trajectory).all()
        return engine.decode([trajectory])[0]

    return engine.run(job)


def in_use(machine: Machine, engine: CudaEngine) -> int:
    """Return the bytes of device memory in use, after garbage collection."""
    gc.collect()
    engine.run(engine._context.stream.free_deferred)
    return machine.used


def test_pixels_match_the_host_engine(engine: CudaEngine, host: HostEngine) -> None:
    for trajectory in (call(7), call(1, 2, 3), call(4, 5, 6, steps=1)):
        np.testing.assert_array_equal(sampled(engine, trajectory), sampled(host, Trajectory(trajectory.call)))


def test_latents_replace_the_initial_noise(engine: CudaEngine, host: HostEngine) -> None:
    latents = np.random.default_rng(0).standard_normal((2, *MANIFEST.sample.shape), np.float32)
    np.testing.assert_array_equal(sampled(engine, call(1, 2, latents=latents)), sampled(host, call(1, 2, latents=latents)))


def test_a_shape_is_reused_with_other_seeds_and_conditioning(engine: CudaEngine, host: HostEngine) -> None:
    for seeds in ((1, 2), (3, 4), (1, 2)):
        np.testing.assert_array_equal(sampled(engine, call(*seeds)), sampled(host, call(*seeds)))


def test_merged_trajectories_at_different_steps_match_separate_runs(engine: CudaEngine) -> None:
    alone = [sampled(engine, call(1, 2)), sampled(engine, call(3))]
    ahead, behind = call(1, 2), call(3)

    def job() -> list[NDArray[Any]]:
        engine.start(ahead)
        step(engine, ahead)
        engine.start(behind)
        step(engine, ahead, behind)  # the second step of one, the first of the other
        step(engine, behind)
        assert engine.finite_flags(ahead).shape == (2, 2)
        assert engine.finite_flags(behind).all()
        return engine.decode([ahead, behind])

    for merged, expected in zip(engine.run(job), alone, strict=True):
        np.testing.assert_array_equal(merged, expected)


def test_samplers_with_several_evaluations_per_step(machine: Machine, tiny_guided: tuple[Path, Path, Path]) -> None:
    folder = tiny_guided[0]
    manifest = read_manifest(folder)
    schedules, times = SolverTables(folder, manifest), ("heun", None, "dpm-solver-2s")
    host = HostEngine(BundleSessions(folder, manifest, "fp32", lambda path: open_session(path, SessionSettings(threads=1))), "fp32", manifest.initial_scale)
    engine = open_cuda_engine(CudaContext(0, None), folder, manifest, "fp32", SessionSettings(PLACEMENT), open_session=machine.open_session)

    def calls() -> list[Trajectory]:
        given: dict[str, NDArray[Any]] = {"class_labels": np.array([1, 2], np.int64), "guidance_scale": np.array([2, 3], np.float32)}
        return [Trajectory(Call(np.array([k, k + 9], np.int64), given, schedules.evaluations(name, 8, None), None)) for k, name in enumerate(times)]

    def together(engine: Engine, trajectories: list[Trajectory]) -> list[NDArray[Any]]:
        def job() -> list[NDArray[Any]]:
            for one in trajectories:
                engine.start(one)
            while waiting := [one for one in trajectories if not one.done]:
                step(engine, *waiting)
            assert all(engine.finite_flags(one).all() for one in trajectories)
            return [np.array(engine.read_state(one)) for one in trajectories]

        return engine.run(job)

    alone = [together(host, [one])[0] for one in calls()]
    for mine, expected in zip(together(engine, calls()), alone, strict=True):
        np.testing.assert_array_equal(mine, expected)
    assert any(np.abs(alone[0] - other).max() > 1e-3 for other in alone[1:])
    engine.close()


def test_merged_trajectories_at_the_same_step_draw_noise_in_one_run(engine: CudaEngine, machine: Machine) -> None:
    one, other = call(1, 2), call(3)

    def job() -> list[NDArray[Any]]:
        engine.start(one)
        engine.start(other)
        machine.runs.clear()
        step(engine, one, other)
        assert [(run.graph, run.n) for run in machine.runs if run.captured] == [("noise.onnx", 3), ("step.fp32.onnx", 3), ("finite.onnx", 3)]
        step(engine, one, other)
        return engine.decode([one, other])

    merged = engine.run(job)
    for pixels, seeds in zip(merged, ((1, 2), (3,)), strict=True):
        np.testing.assert_array_equal(pixels, sampled(engine, call(*seeds)))
    assert merged[0].base is None  # the result of one caller does not keep the memory of another's alive


def test_states_are_copied_to_the_host_only_when_they_are_fetched(engine: CudaEngine, machine: Machine) -> None:
    pixels = sampled(engine, call(1, 2, 3))
    assert sorted(machine.to_host) == sorted([2 * 3 * 4, pixels.nbytes])  # one flag per step and sample, and the pixels


def test_fetched_and_replaced_states(engine: CudaEngine, host: HostEngine) -> None:
    def job(engine: Engine) -> tuple[NDArray[Any], ...]:
        trajectory = call(1, 2)
        engine.start(trajectory)
        step(engine, trajectory)
        first = np.array(engine.read_state(trajectory))
        engine.set_state(trajectory, first[::-1] * 2)
        assert engine.finite_flags(trajectory).shape == (0, 2)
        step(engine, trajectory)
        assert engine.finite_flags(trajectory).shape == (1, 2)
        return first, np.array(engine.read_state(trajectory)), engine.decode([trajectory])[0]

    for ours, theirs in zip(engine.run(lambda: job(engine)), job(host), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_finite_flags_are_per_sample_and_evaluation(engine: CudaEngine, bad: float) -> None:
    trajectory = call(1, 2, 3)

    def job() -> NDArray[np.bool_]:
        engine.start(trajectory)
        step(engine, trajectory)
        x = np.array(engine.read_state(trajectory))
        x[1, 0, 0, 0] = bad
        engine.set_state(trajectory, x)
        step(engine, trajectory)
        return engine.finite_flags(trajectory)

    assert engine.run(job).tolist() == [[True, False, True]]


def test_finite_graph_matches_the_code_that_builds_it() -> None:
    x, finite = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", ["N", "D"]), ("finite", ["N"])))
    nodes = [helper.make_node("Sub", ["x", "x"], ["zero_or_nan"]), helper.make_node("ReduceSum", ["zero_or_nan", "axes"], ["finite"], keepdims=0)]
    graph = helper.make_graph(nodes, "finite", [x], [finite], [helper.make_tensor("axes", TensorProto.INT64, [1], [1])])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9, producer_name="scm-runtime")
    assert onnx.load(FINITE) == made
    flags = open_session(FINITE)(x=np.array([[1, -3e38], [np.inf, 0], [0, -np.inf], [np.nan, 1]], np.float32))
    assert (flags == 0).tolist() == [True, False, False, False]


def launched(machine: Machine) -> dict[str, int]:
    """Return how often runs of each graph were launched as a part of a CUDA graph."""
    counts: Counter[str] = Counter()
    for graph in machine.graphs:
        for run in graph.runs:
            counts[run.graph] += graph.launches
    return dict(counts)


def test_every_shape_is_captured_once_and_replayed(engine: CudaEngine, machine: Machine) -> None:
    sampled(engine, call(1))
    sampled(engine, call(1, 2))
    graphs = len(machine.graphs)
    assert sorted((run.graph, run.n) for graph in machine.graphs for run in graph.runs) == sorted((name, n) for name in LOOP for n in (1, 2))
    machine.runs.clear()
    sampled(engine, call(3, 4))
    assert machine.runs == []
    assert len(machine.graphs) == graphs
    assert engine.cuda_graph
    assert engine.captured_batch_sizes == (1, 2)


def test_the_number_of_captured_shapes_is_limited(engine: CudaEngine, machine: Machine, host: HostEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_cache, "MAX_GRAPHS", 2)
    monkeypatch.setattr(shape_cache, "MAX_UNCAPTURED", 1)
    for n in (1, 2, 3, 4, 3, 1):
        np.testing.assert_array_equal(sampled(engine, call(*range(n))), sampled(host, call(*range(n))))
    assert engine.captured_batch_sizes == (1, 2)
    assert {run.n for run in machine.runs if run.captured} == {1, 2}


def test_a_captured_shape_that_is_idle_gives_its_graphs_back(engine: CudaEngine, machine: Machine, host: HostEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_cache, "MAX_GRAPHS", 2)
    monkeypatch.setattr(shape_cache, "IDLE_USES", 20)

    def sample(n: int) -> None:
        np.testing.assert_array_equal(sampled(engine, call(*range(n))), sampled(host, call(*range(n))))

    for n in (1, 2, 3):
        sample(n)
    assert not any(graph.destroyed for graph in machine.graphs)
    for _ in range(10):  # the shape 1 is idle while 2 and 3 are in use
        sample(2)
        sample(3)
    assert {(run.graph, run.n) for graph in machine.graphs if graph.destroyed for run in graph.runs} == {(name, 1) for name in LOOP}
    assert engine.captured_batch_sizes == (2, 3)
    launches = sum(graph.launches for graph in machine.graphs)
    sample(1)
    assert sum(graph.launches for graph in machine.graphs) == launches


def test_buffers_without_a_graph_are_evicted(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_cache, "MAX_UNCAPTURED", 1)
    engine = opened(machine, cuda_graph=False)
    used = []
    for n in (4, 5, 4, 5):
        sampled(engine, call(*range(n)))
        used.append(in_use(machine, engine))
    assert used[0] == used[2]
    assert used[1] == used[3]
    engine.close()


def test_without_cuda_graphs(machine: Machine, host: HostEngine) -> None:
    engine = opened(machine, cuda_graph=False)
    np.testing.assert_array_equal(sampled(engine, call(1, 2)), sampled(host, call(1, 2)))
    assert machine.graphs == []
    assert not engine.cuda_graph
    engine.close()


@pytest.mark.parametrize("name", ["noise.onnx", "step.fp32.onnx"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_graph_with_nodes_on_the_cpu(machine: Machine, host: HostEngine, caplog: pytest.LogCaptureFixture, name: str, cuda_graph: bool) -> None:
    """ONNX Runtime copies the inputs of CPU nodes when it binds them: each run binds again, after the stream is synchronized."""
    machine.refuses_graphs = {name}
    with caplog.at_level(logging.INFO, "scm_runtime"):
        engine = opened(machine, cuda_graph=cuda_graph)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"'{name}' runs with copies to the CPU and back, and without CUDA graphs"]
    for seeds in ((1, 2), (3, 4), (1, 2)):
        np.testing.assert_array_equal(sampled(engine, call(*seeds)), sampled(host, call(*seeds)))
    assert launched(machine).keys() == (LOOP - {name} if cuda_graph else set())
    engine.close()


def test_a_graph_whose_capture_fails_runs_uncaptured(machine: Machine, host: HostEngine, caplog: pytest.LogCaptureFixture) -> None:
    machine.fails_to_capture = {"step.fp32.onnx"}
    engine = opened(machine)
    with caplog.at_level(logging.INFO, "scm_runtime"):
        for seeds in ((1,), (1, 2), (1,)):
            np.testing.assert_array_equal(sampled(engine, call(*seeds)), sampled(host, call(*seeds)))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["'step.fp32.onnx' runs without a CUDA graph for a batch of 1"]
    assert sum(run.captured for run in machine.runs if run.graph == "step.fp32.onnx") == 2  # it is tried twice
    assert launched(machine).keys() == LOOP - {"step.fp32.onnx"}
    assert not engine.cuda_graph
    engine.close()


def test_a_shape_whose_capture_runs_out_of_memory_runs_uncaptured(engine: CudaEngine, machine: Machine, host: HostEngine) -> None:
    machine.no_memory_to_capture = {2}
    for seeds in ((1, 2), (3,), (4, 5)):
        np.testing.assert_array_equal(sampled(engine, call(*seeds)), sampled(host, call(*seeds)))
    assert [run.n for run in machine.runs if run.graph == "step.fp32.onnx" and run.captured] == [2, 1]  # one failed attempt, and a capture
    assert engine.cuda_graph


class NumbaStream:
    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.handle)


class TorchStream:
    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle


@pytest.mark.parametrize("kind", [int, NumbaStream, TorchStream])
def test_uses_the_callers_stream_without_waiting_for_the_callers_work(machine: Machine, host: HostEngine, kind: type) -> None:
    theirs = machine.make_stream()
    engine, trajectory, later = opened(machine, kind(theirs.handle)), call(2), []
    np.testing.assert_array_equal(sampled(engine, call(1)), sampled(host, call(1)))
    engine.run(lambda: engine.start(trajectory))
    engine.run(lambda: engine.read_state(trajectory))
    theirs.queue.append(lambda: later.append("the caller's work"))
    engine.run(lambda: engine.step([trajectory]))
    assert later == []
    engine.run(lambda: engine.read_state(trajectory))
    assert later  # the download waits for work enqueued before it
    engine.close()
    assert not theirs.closed
    assert machine.device_syncs == 0
    assert len(machine.streams) == 2  # the default stream and the caller's


def test_the_default_stream_is_never_captured(machine: Machine, host: HostEngine) -> None:
    engine = opened(machine, 0)  # as torch numbers it; for ONNX Runtime 0 means that no stream is given
    assert engine._context.stream_handle == LEGACY
    np.testing.assert_array_equal(sampled(engine, call(1)), sampled(host, call(1)))
    assert machine.graphs == []
    engine.close()


def test_a_stream_of_another_device_is_rejected(machine: Machine) -> None:
    with pytest.raises(InvalidArgumentError, match=r"belong to the device cuda:0, got a stream of cuda:1"):
        CudaContext(0, machine.make_stream(1).handle)


@pytest.mark.parametrize("stream", [True, "0", -1, 2, object(), 12345])
def test_invalid_streams_are_rejected(machine: Machine, stream: object) -> None:
    with pytest.raises(InvalidArgumentError, match="stream must be"):
        CudaContext(0, stream)


def consumed(array: DeviceArray, **arguments: Any) -> Capsule:
    capsule = array.__dlpack__(**arguments)
    assert isinstance(capsule, Capsule)
    return capsule


def read(machine: Machine, capsule: Capsule, stream: Stream) -> NDArray[Any]:
    """Return what a consumer reads that enqueues its work on a stream and waits for that."""
    nbytes = int(np.prod(capsule.shape)) * capsule.dtype.itemsize
    seen: list[NDArray[Any]] = []
    machine.allow_other_threads = True
    stream.put(lambda: seen.append(machine.bytes_at(capsule.address, nbytes, queueing=False).view(capsule.dtype).reshape(capsule.shape).copy()))
    stream.record().sync()
    return seen[0]


@pytest.mark.parametrize("asked", ["none", "legacy", "own"])
def test_a_dlpack_consumer_gets_the_result_without_host_synchronization(machine: Machine, host: HostEngine, asked: str) -> None:
    engine, trajectory = opened(machine), call(1, 2)
    stream = machine.make_stream() if asked == "own" else machine.legacy

    def job() -> DeviceArray:
        engine.start(trajectory)
        step(engine, trajectory)
        step(engine, trajectory)
        return engine.decode_on_device(trajectory)

    array = engine.run(job)
    assert machine.to_host == []
    assert array.__dlpack_device__() == (2, 0)
    assert (array.shape, array.dtype, len(array)) == ((2, *MANIFEST.output.shape), np.dtype(np.uint8), 2)
    capsule = consumed(array, stream={"none": None, "legacy": 1, "own": stream.handle}[asked], max_version=(1, 0))
    assert machine.waits[-1][0] == stream.handle
    assert capsule.versioned
    assert not consumed(array, stream=-1).versioned
    np.testing.assert_array_equal(read(machine, capsule, stream), sampled(host, call(1, 2)))
    machine.allow_other_threads = False
    engine.close()


def test_dlpack_stream_minus_one_adds_no_wait_and_invalid_arguments_are_rejected(machine: Machine) -> None:
    engine, trajectory = opened(machine), call(1)
    engine.run(lambda: engine.start(trajectory))
    array = engine.run(lambda: engine.decode_on_device(trajectory))
    consumed(array, stream=-1)
    assert machine.waits == []
    for arguments, said in (({"stream": 0}, "stream"), ({"stream": -2}, "stream"), ({"copy": True}, "copy"), ({"dl_device": (1, 0)}, "device")):
        with pytest.raises(BufferError, match=said):
            array.__dlpack__(**arguments)
    consumed(array, stream=-1, dl_device=(2, 0), copy=False)
    engine.close()


def test_a_result_on_the_device_outlives_the_engine_and_later_calls(machine: Machine, host: HostEngine) -> None:
    engine, trajectory = opened(machine), call(1)

    def job() -> DeviceArray:
        engine.start(trajectory)
        step(engine, trajectory)
        step(engine, trajectory)
        return engine.decode_on_device(trajectory)

    array = engine.run(job)
    capsule = consumed(array)
    del array
    gc.collect()
    sampled(engine, call(5))
    engine.close()
    trajectory.state = None
    gc.collect()
    expected = sampled(host, call(1))
    np.testing.assert_array_equal(read(machine, capsule, machine.legacy), expected)
    assert machine.used >= expected.nbytes
    address = capsule.address
    del capsule
    gc.collect()
    assert machine.used == 0
    assert machine.frees[-1] == (address, LEGACY)  # ordered after the consumer's work on that stream


def test_out_of_memory_names_remedies_and_leaves_a_working_engine(machine: Machine, host: HostEngine) -> None:
    engine = opened(machine)
    before = sampled(engine, call(1))
    settled = in_use(machine, engine)
    machine.largest_batch = 4
    message = r"cuda:0 is out of memory with a batch of 8 in fp32\. Try a smaller batch, half precision.*gpu_mem_limit"
    with pytest.raises(OutOfMemoryError, match=message) as raised:
        sampled(engine, call(*range(8)))
    del raised  # the frames of its traceback hold buffers
    assert in_use(machine, engine) == settled
    np.testing.assert_array_equal(sampled(engine, call(0, 1, 2, 3)), sampled(host, call(0, 1, 2, 3)))
    np.testing.assert_array_equal(sampled(engine, call(1)), before)
    engine.close()


def test_out_of_memory_while_buffers_are_allocated(machine: Machine, host: HostEngine) -> None:
    engine = opened(machine)
    machine.capacity = 1 << 18
    with pytest.raises(OutOfMemoryError, match="batch of 64"):
        sampled(engine, call(*range(64)))
    np.testing.assert_array_equal(sampled(engine, call(1)), sampled(host, call(1)))
    engine.close()


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_arenas_without_captured_graphs_shrink_after_out_of_memory(machine: Machine, cuda_graph: bool) -> None:
    engine = opened(machine, cuda_graph=cuda_graph)
    sampled(engine, call(1))
    machine.largest_batch = 4
    with pytest.raises(OutOfMemoryError):
        sampled(engine, call(*range(8)))
    machine.runs.clear()
    sampled(engine, call(1))
    sampled(engine, call(1))
    shrunk = [run for run in machine.runs if run.shrinks]
    assert shrunk == [GraphRun(graph, False, 1, True) for graph in ("noise.onnx", "step.fp32.onnx", "finite.onnx", "decode.fp32.onnx") if not cuda_graph]
    engine.close()


def test_the_error_of_a_lost_context_says_to_restart_the_process(machine: Machine) -> None:
    engine = opened(machine)
    machine.fatal = True
    for _ in range(2):
        with pytest.raises(InferenceError, match=r"illegal memory access.*Restart the process"):
            sampled(engine, call(1))
    session = weakref.ref(engine.graphs().step)
    thread = engine._context._jobs.thread
    machine.runs.clear()
    engine.close()  # raises nothing and calls nothing in CUDA
    assert session() is not None
    assert not thread.is_alive()


def test_close_frees_all_memory_and_ends_the_thread(machine: Machine) -> None:
    engine = opened(machine)
    session = weakref.ref(engine.graphs().step)
    sampled(engine, call(1, 2))
    sampled(engine, call(3))
    thread = engine._context._jobs.thread
    engine.close()
    gc.collect()
    assert machine.used == 0
    assert machine.leaked == []
    assert machine.pinned == {}
    assert machine.events == []
    assert session() is None
    assert not thread.is_alive()
    engine.close()
    with pytest.raises(GeneratorClosedError):
        engine.run(lambda: None)
    with pytest.raises(GeneratorClosedError):
        engine.graphs()


def test_memory_of_finished_calls_is_freed_in_the_engines_thread(machine: Machine) -> None:
    engine = opened(machine)
    sampled(engine, call(1))
    settled = in_use(machine, engine)
    for seed in range(5):
        sampled(engine, call(seed))  # the trajectory is destroyed here, in this thread
        gc.collect()
    assert in_use(machine, engine) == settled
    engine.close()


def test_two_engines_share_a_context(machine: Machine, host: HostEngine) -> None:
    context = CudaContext(0)
    first, second = opened(machine, context=context), opened(machine, context=context)
    both = first.run(lambda: (sampled(first, call(1)), sampled(second, call(1))))
    np.testing.assert_array_equal(*both)
    first.close()
    np.testing.assert_array_equal(sampled(second, call(1)), both[0])
    second.close()
    assert machine.used == 0


def test_the_context_is_usable_after_a_bundle_failed_to_open(machine: Machine) -> None:
    context = CudaContext(0)

    def refuse(path: Path, settings: SessionSettings) -> Session:
        raise InferenceError("no")

    with pytest.raises(InferenceError, match="no"):
        open_cuda_engine(context, DIGITS, MANIFEST, "fp32", SessionSettings(PLACEMENT), open_session=refuse)
    engine = opened(machine, context=context)
    sampled(engine, call(1))
    engine.close()


def test_calls_from_many_threads_use_cuda_in_one_thread(machine: Machine, host: HostEngine) -> None:
    engine = opened(machine)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda seed: sampled(engine, call(seed)), range(16)))
    for seed, pixels in enumerate(results):
        np.testing.assert_array_equal(pixels, sampled(host, call(seed)))
    assert len(machine.threads) == 1
    assert threading.get_ident() not in machine.threads
    engine.close()


def test_errors_reach_the_caller_with_their_traceback(engine: CudaEngine) -> None:
    def fails() -> None:
        raise ZeroDivisionError("in the job")

    with pytest.raises(ZeroDivisionError, match="in the job") as raised:
        engine.run(fails)
    assert "fails" in [entry.name for entry in raised.traceback]
    assert engine.run(lambda: 3) == 3


def test_an_interrupted_caller_leaves_a_working_engine(engine: CudaEngine, host: HostEngine) -> None:
    go, main = threading.Event(), threading.get_ident()

    def slow() -> None:
        signal.pthread_kill(main, signal.SIGINT)
        go.wait(10)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.run(slow)
    finally:
        signal.signal(signal.SIGINT, previous)
    go.set()
    np.testing.assert_array_equal(sampled(engine, call(1)), sampled(host, call(1)))


def test_a_cancelled_job_that_waits_for_another_is_withdrawn(engine: CudaEngine) -> None:
    started, go, scope = threading.Event(), threading.Event(), CancelScope()

    def occupy() -> None:
        started.set()
        assert go.wait(10)

    def cancelled() -> None:
        scope.call(lambda: engine.run(lambda: ran.append(True)))

    ran: list[bool] = []
    with ThreadPoolExecutor(2) as pool:
        occupied = pool.submit(lambda: engine.run(occupy))
        assert started.wait(10)
        waiting = pool.submit(cancelled)
        scope.cancel(lambda: GenerationTimeoutError("late"))
        with pytest.raises(GenerationTimeoutError, match="late"):
            waiting.result(10)
        go.set()
        occupied.result(10)
    engine.run(lambda: None)
    assert not ran


def test_another_thread_with_the_identifier_of_the_ended_one_is_told_apart(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened(machine)
    engine.close()
    monkeypatch.setattr(threading, "get_ident", lambda ident=engine._context._jobs.thread.ident: ident)
    assert not engine._context.is_current
    with pytest.raises(GeneratorClosedError):
        engine._context.run(lambda: None)


def test_a_dropped_context_ends_its_thread(machine: Machine) -> None:
    engine = opened(machine)
    sampled(engine, call(1))
    thread = engine._context._jobs.thread
    machine.allow_other_threads = True
    del engine
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_timing_events_can_be_read_from_any_thread(engine: CudaEngine) -> None:
    trajectory = call(1)
    sampled(engine, trajectory)
    assert [part.name for part in trajectory.parts] == ["noise", "noise", "step", "noise", "step", "decode", "copy"]
    assert all(engine.elapsed(part.start, part.end) > 0 for part in trajectory.parts)


def test_a_capture_waits_for_running_jobs_and_blocks_new_ones() -> None:
    lock, order, inside = CaptureLock(), [], threading.Event()
    leave = threading.Event()

    def other(name: str) -> None:
        with lock.shared():
            order.append(name)
            inside.set()
            leave.wait(10)
            order.append(f"{name} ends")

    def capture() -> None:
        with lock.shared(), lock.exclusive():
            order.append("captures")

    first = threading.Thread(target=other, args=("first",))
    first.start()
    inside.wait(10)
    capturing = threading.Thread(target=capture)
    capturing.start()
    while not lock._waiting:
        time.sleep(0.001)
    second = threading.Thread(target=other, args=("second",))
    second.start()
    leave.set()
    for thread in (first, capturing, second):
        thread.join(10)
    assert order == ["first", "first ends", "captures", "second", "second ends"]


def test_a_job_that_waits_for_another_contexts_job_does_not_block_its_captures(machine: Machine) -> None:
    machine.allow_other_threads = True
    first, second = opened(machine), opened(machine)
    answer: list[NDArray[Any]] = []
    asks = threading.Thread(target=lambda: answer.append(first.run(lambda: sampled(second, call(1)))), daemon=True)  # as a callback may
    asks.start()
    asks.join(20)
    assert answer
    first.close()
    second.close()


def test_provider_options() -> None:
    options = cuda_options(1, gpu_mem_limit=1 << 30, cuda_graph=True, stream_handle=77, extra={"use_tf32": "1", "device_id": "1"})
    assert options["gpu_mem_limit"] == str(1 << 30)
    assert (options["device_id"], options["user_compute_stream"], options["enable_cuda_graph"], options["use_tf32"]) == ("1", "77", "1", "1")
    assert cuda_options(0, cuda_graph=False, stream_handle=77)["enable_cuda_graph"] == "0"
    for name, argument in (("user_compute_stream", "stream"), ("enable_cuda_graph", "cuda_graph"), ("device_id", "device")):
        with pytest.raises(InvalidArgumentError, match=rf"must not contain {name}: pass {argument}="):
            cuda_options(0, stream_handle=77, extra={name: "5"})


def test_the_error_names_the_device_that_cannot_be_used(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    core, *others = machine.modules()

    def broken(index: int) -> None:
        raise CudaError("CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected")

    core.Device = broken
    monkeypatch.setattr(cuda, "_import_cuda", lambda: (core, *others))
    with pytest.raises(DeviceError, match=r"cuda:3 cannot be used: .*NO_DEVICE.* scm-runtime doctor"):
        CudaContext(3)


def test_without_cuda_core_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'onnxruntime-gpu\[cuda,cudnn\]>="):
        CudaContext(0)
