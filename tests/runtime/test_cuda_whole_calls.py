"""Calls that the CUDA engine computes as a whole, on a simulated machine (fake_cuda): one upload, one CUDA graph, one copy to the host."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.fake_cuda import DIGITS, MANIFEST, PLACEMENT, FakeSession, Machine, call
from scm_runtime.bundle.manifest import read_manifest
from scm_runtime.bundle.solver_tables import SolverTables, from_times
from scm_runtime.engines.cuda import shape_cache, whole_call
from scm_runtime.engines.cuda import stream as cuda
from scm_runtime.engines.cuda.batch_sizes import BATCH_SIZES
from scm_runtime.engines.cuda.engine import CudaEngine
from scm_runtime.engines.cuda.open_engine import open_cuda_engine
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.engines.engine import Engine, Output, Trajectory
from scm_runtime.engines.host import HostEngine
from scm_runtime.engines.sessions import BundleSessions
from scm_runtime.errors import GeneratorClosedError, OutOfMemoryError
from scm_runtime.inputs.call import Call
from scm_runtime.ort.open_session import open_session
from scm_runtime.ort.options import SessionSettings

LOOP = ("noise.onnx", "noise.onnx", "noise.onnx", "step.fp32.onnx", "finite.onnx", "step.fp32.onnx", "finite.onnx", "decode.fp32.onnx")  # of two steps


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(cuda, "_import_cuda", made.modules)
    return made


@pytest.fixture(scope="module")
def host() -> HostEngine:
    return host_engine(DIGITS)


def host_engine(folder: Path) -> HostEngine:
    manifest = read_manifest(folder)
    settings = SessionSettings(threads=1)
    return HostEngine(BundleSessions(folder, manifest, "fp32", lambda path: open_session(path, settings)), "fp32", manifest.initial_scale)


def opened(machine: Machine, folder: Path = DIGITS, *, cuda_graph: bool = True) -> CudaEngine:
    manifest = read_manifest(folder)
    return open_cuda_engine(
        CudaContext(0, None), folder, manifest, "fp32", SessionSettings(PLACEMENT), cuda_graph=cuda_graph, open_session=machine.open_session
    )


@pytest.fixture
def engine(machine: Machine) -> Iterator[CudaEngine]:
    made = opened(machine)
    yield made
    made.close()


def in_steps(engine: Engine, trajectory: Trajectory) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the last state and the pixels of a call that is evaluated step by step."""

    def job() -> tuple[NDArray[Any], NDArray[Any]]:
        engine.start(trajectory)
        while not trajectory.done:
            engine.step([trajectory])
            trajectory.evaluations_done += 1
        return np.array(engine.read_state(trajectory)), engine.decode([trajectory])[0]

    return engine.run(job)


def whole(engine: CudaEngine, *trajectories: Trajectory, outputs: Sequence[Output] | None = None) -> list[NDArray[Any]]:
    """Return the pixels or states of calls that are computed as a whole."""
    wanted = outputs or ["pixels"] * len(trajectories)

    def job() -> list[NDArray[Any]]:
        assert engine.sample(trajectories, wanted)
        results = []
        for one, output in zip(trajectories, wanted, strict=True):
            one.evaluations_done = len(one.call.evaluations)
            assert engine.finite_flags(one).shape == (one.evaluations_done, len(one))
            assert engine.finite_flags(one).all()
            results.append(engine.decode([one])[0] if output == "pixels" else np.array(engine.read_state(one)))
        return results

    return engine.run(job)


def test_pixels_and_states_match_the_host_engine(engine: CudaEngine, host: HostEngine) -> None:
    for trajectory in (call(7), call(1, 2, 3), call(4, 5, 6, steps=1), call(3, 2, 1)):
        state, pixels = in_steps(host, Trajectory(trajectory.call))
        np.testing.assert_array_equal(whole(engine, Trajectory(trajectory.call))[0], pixels)
        np.testing.assert_array_equal(whole(engine, Trajectory(trajectory.call), outputs=["state"])[0], state)


def test_latents_replace_the_initial_noise(engine: CudaEngine, host: HostEngine) -> None:
    latents = np.random.default_rng(0).standard_normal((2, *MANIFEST.sample.shape), np.float32)
    for latents_now in (latents, -latents):
        trajectory = call(1, 2, latents=latents_now)
        np.testing.assert_array_equal(whole(engine, trajectory)[0], in_steps(host, Trajectory(trajectory.call))[1])


@pytest.mark.parametrize("sampler", ["heun", "dpm-solver-2s", None])
def test_samplers_with_several_evaluations_per_step(
    machine: Machine, tiny_guided: tuple[Path, Path, Path], sampler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_call, "MAX_EVALUATIONS", 99)
    folder = tiny_guided[0]
    manifest = read_manifest(folder)
    engine, evaluations = opened(machine, folder), SolverTables(folder, manifest).evaluations(sampler, 8, None)
    given: dict[str, NDArray[Any]] = {"class_labels": np.array([1, 2], np.int64), "guidance_scale": np.array([2, 3], np.float32)}
    first = Trajectory(Call(np.array([5, 6], np.int64), given, evaluations, None))
    expected, _ = in_steps(host_engine(folder), Trajectory(first.call))
    for _ in range(2):
        np.testing.assert_array_equal(whole(engine, Trajectory(first.call), outputs=["state"])[0], expected)
    engine.close()


def test_a_repeated_call_is_one_upload_one_launch_and_one_copy_to_the_host(engine: CudaEngine, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole(engine, call(1, 2))
    assert [[run.graph for run in graph.runs] for graph in machine.graphs] == [list(LOOP)]
    for name in ("runs", "to_host"):
        getattr(machine, name).clear()
    sizes, copy = list[int](), machine.copy

    def counted(to: int, source: int, nbytes: int, stream: Any) -> Any:
        sizes.append(nbytes)
        return copy(to, source, nbytes, stream)

    monkeypatch.setattr(machine, "copy", counted)
    launches = machine.graphs[0].launches
    pixels = whole(engine, call(3, 4))[0]
    assert machine.graphs[0].launches == launches + 1
    assert machine.runs == []
    assert len(sizes) == 2
    assert machine.to_host == sizes[1:]
    assert sizes[1] >= pixels.nbytes


def test_other_times_and_conditioning_use_the_same_graph(engine: CudaEngine, machine: Machine, host: HostEngine) -> None:
    for times in ((1.5, 1.0, 0.0), (1.2, 0.3, 0.0)):
        one = call(1, 2)
        trajectory = Trajectory(Call(one.call.seeds, {"class_labels": np.array([8, 3], np.int64)}, from_times(times), None))
        np.testing.assert_array_equal(whole(engine, trajectory)[0], in_steps(host, Trajectory(trajectory.call))[1])
    assert len(machine.graphs) == 1


def test_calls_are_merged_and_keep_their_own_results(engine: CudaEngine, host: HostEngine) -> None:
    asked = [call(1, 2), call(3, 6), call(4, 5)]
    expected = [in_steps(host, Trajectory(one.call)) for one in asked]
    wanted: list[Output] = ["pixels", "state", "pixels"]
    for _ in range(2):
        results = whole(engine, *(Trajectory(one.call) for one in asked), outputs=wanted)
        for result, output, (state, pixels) in zip(results, wanted, expected, strict=True):
            np.testing.assert_array_equal(result, pixels if output == "pixels" else state)
            assert result.base is None  # the result of one caller does not keep the memory of another's alive


def test_calls_with_many_or_different_evaluations_are_not_computed_as_a_whole(engine: CudaEngine) -> None:
    times = tuple(1.5 - 0.1 * k for k in range(whole_call.MAX_EVALUATIONS + 2))
    long = Trajectory(Call(np.array([1], np.int64), {"class_labels": np.array([1], np.int64)}, from_times(times), None))
    latents = np.zeros((1, *MANIFEST.sample.shape), np.float32)
    for trajectories in ([long], [call(1), call(2, steps=1)], [call(1), long], [call(1), call(2, latents=latents)]):
        assert not engine.run(partial(engine.sample, trajectories, ["pixels"] * len(trajectories)))


def test_results_for_dlpack_are_on_the_device(engine: CudaEngine, machine: Machine, host: HostEngine) -> None:
    one, other = call(1, 2), call(3)

    def job() -> list[Any]:
        assert engine.sample([one, other], ["device", "device"])
        return [engine.decode_on_device(one), engine.decode_on_device(other)]

    arrays = engine.run(job)
    assert len(machine.to_host) == 1  # the flags
    whole(engine, call(8, 9, 10))  # overwrites the buffers of the batch
    for array, trajectory in zip(arrays, (one, other), strict=True):
        buffer = array._buffer
        machine.allow_other_threads = True
        machine.legacy.execute_to(machine.legacy.record())
        found = machine.bytes_at(buffer.address, buffer.nbytes, queueing=False).view(array.dtype).reshape(array.shape)
        np.testing.assert_array_equal(found, in_steps(host, Trajectory(trajectory.call))[1])


def test_a_state_that_is_replaced_is_decoded_again(engine: CudaEngine, host: HostEngine) -> None:
    trajectory, replacement = call(1, 2), np.full((2, *MANIFEST.sample.shape), 0.25, np.float32)

    def job() -> NDArray[Any]:
        assert engine.sample([trajectory], ["pixels"])
        engine.set_state(trajectory, replacement)
        assert engine.finite_flags(trajectory).shape == (0, 2)
        np.testing.assert_array_equal(engine.read_state(trajectory), replacement)
        return engine.decode([trajectory])[0]

    decoded = engine.run(job)
    np.testing.assert_array_equal(decoded, host._graphs.decode(x=replacement))


def test_flags_tell_the_sample_and_the_evaluation(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, evaluated, run = opened(machine), 0, FakeSession.__call__

    def overflowing(session: FakeSession, **inputs: Any) -> Any:
        nonlocal evaluated
        result = run(session, **inputs)
        if session.path.name.startswith("step"):
            evaluated += 1
            if evaluated % 2 == 0:  # the second evaluation of each time that the work is done
                result = np.array(result)
                result[1] = np.nan
        return result

    monkeypatch.setattr(FakeSession, "__call__", overflowing)
    trajectory = call(1, 2, 3)
    assert engine.run(lambda: engine.sample([trajectory], ["pixels"]))
    assert engine.run(lambda: engine.finite_flags(trajectory)).tolist() == [[True, True, True], [True, False, True]]
    engine.close()


@pytest.mark.parametrize(("n", "size"), [(9, 10), (11, 12), (17, 20), (33, 40)])
def test_batches_are_padded_to_a_captured_size(engine: CudaEngine, machine: Machine, host: HostEngine, n: int, size: int) -> None:
    trajectory = call(*range(n))
    state, pixels = in_steps(host, Trajectory(trajectory.call))
    np.testing.assert_array_equal(whole(engine, Trajectory(trajectory.call))[0], pixels)
    np.testing.assert_array_equal(whole(engine, Trajectory(trajectory.call), outputs=["state"])[0], state)
    np.testing.assert_array_equal(in_steps(engine, Trajectory(trajectory.call))[1], pixels)
    assert {run.n for run in machine.runs} == {size}
    assert engine.captured_batch_sizes == (size,)


def test_merged_trajectories_at_different_steps_are_padded(engine: CudaEngine, host: HostEngine, machine: Machine) -> None:
    ahead, behind = call(*range(5)), call(*range(9, 13))

    def job() -> list[NDArray[Any]]:
        engine.start(ahead)
        engine.step([ahead])
        ahead.evaluations_done += 1
        engine.start(behind)
        machine.runs.clear()
        engine.step([ahead, behind])
        assert {run.n for run in machine.runs} == {10}
        behind.evaluations_done += 1
        engine.step([behind])
        return engine.decode([ahead, behind])

    for merged, trajectory in zip(engine.run(job), (ahead, behind), strict=True):
        np.testing.assert_array_equal(merged, in_steps(host, Trajectory(trajectory.call))[1])


def test_all_batch_sizes_share_the_graphs_of_a_few(engine: CudaEngine, machine: Machine) -> None:
    sizes = np.random.default_rng(0).permutation(np.arange(1, 34))
    for n in (*sizes, *sizes[:5]):
        whole(engine, call(*range(n)))
    assert len(machine.graphs) == len([size for size in BATCH_SIZES if size <= 40])


def test_padding_holds_valid_inputs(engine: CudaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph may look up its label in a table: a row that is cut off must not hold anything else."""
    labels, run = list[int](), FakeSession.__call__

    def watched(session: FakeSession, **inputs: Any) -> Any:
        labels.extend(inputs.get("class_labels", ()))
        return run(session, **inputs)

    monkeypatch.setattr(FakeSession, "__call__", watched)
    whole(engine, call(*range(9)))
    in_steps(engine, call(*range(9)))
    assert len(labels) >= 2 * 2 * 10
    assert set(labels) <= set(range(10))


def test_a_kept_size_is_not_padded(engine: CudaEngine, machine: Machine) -> None:
    engine.run(lambda: engine.keep_batch_size(9))
    whole(engine, call(*range(9)))
    assert {run.n for run in machine.runs} == {9}


def test_without_cuda_graphs_nothing_is_captured_or_padded(machine: Machine, host: HostEngine) -> None:
    engine = opened(machine, cuda_graph=False)
    trajectory = call(*range(9))
    np.testing.assert_array_equal(whole(engine, Trajectory(trajectory.call))[0], in_steps(host, trajectory)[1])
    assert machine.graphs == []
    assert {run.n for run in machine.runs} == {9}
    engine.close()


def test_an_idle_graph_gives_its_place_and_memory_to_another(engine: CudaEngine, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_cache, "MAX_GRAPHS", 2)
    monkeypatch.setattr(shape_cache, "IDLE_USES", 3)

    def used_after(n: int) -> int:
        whole(engine, call(*range(n)))
        gc.collect()
        engine.run(engine._context.stream.free_deferred)
        return machine.used

    used = [used_after(n) for n in (1, 2, 2, 2, 2, 1)]
    assert [graph.destroyed for graph in machine.graphs] == [False, False]
    assert used[1:] == [used[1]] * 5
    for _ in range(4):
        used_after(2)
    for n in (3, 2):
        used_after(n)
    assert [graph.destroyed for graph in machine.graphs] == [True, False, False]
    assert engine.captured_batch_sizes == (2, 3)


@pytest.mark.parametrize("name", ["step.fp32.onnx", "decode.fp32.onnx"])
def test_if_a_part_cannot_be_captured_the_others_are(machine: Machine, host: HostEngine, caplog: pytest.LogCaptureFixture, name: str) -> None:
    engine, trajectory = opened(machine), call(3)
    captured = whole(engine, trajectory)[0]
    machine.fails_to_capture = {name}
    with caplog.at_level(logging.INFO, "scm_runtime"):
        other = call(1, 2)
        np.testing.assert_array_equal(whole(engine, Trajectory(other.call))[0], in_steps(host, Trajectory(other.call))[1])
        assert not engine.run(lambda: engine.sample([Trajectory(other.call)], ["pixels"]))
        np.testing.assert_array_equal(in_steps(engine, Trajectory(other.call))[1], in_steps(host, Trajectory(other.call))[1])
    whole_call, part = (record.getMessage().split(":")[0] for record in caplog.records)
    assert (whole_call, part) == ("calls run without a CUDA graph for a batch of 2", f"'{name}' runs without a CUDA graph for a batch of 2")
    assert {graph.runs[0].graph for graph in machine.graphs if len(graph.runs) == 1} == set(LOOP) - {name}
    assert engine.cuda_graph == (name != "step.fp32.onnx")
    np.testing.assert_array_equal(whole(engine, Trajectory(trajectory.call))[0], captured)  # its graph exists
    assert not any(stream.capture for stream in machine.streams.values())
    engine.close()


def test_a_shape_whose_capture_runs_out_of_memory_is_the_only_one_without_a_graph(engine: CudaEngine, machine: Machine, host: HostEngine) -> None:
    machine.no_memory_to_capture = {2}
    for seeds in ((1, 2), (3,), (4, 5)):
        trajectory = call(*seeds)
        np.testing.assert_array_equal(whole(engine, Trajectory(trajectory.call))[0], in_steps(host, trajectory)[1])
    assert engine.captured_batch_sizes == (1,)
    assert sum(run.captured for run in machine.runs if run.n == 2) == 1  # it is tried once


def test_a_batch_that_fits_only_without_padding_is_computed(machine: Machine, host: HostEngine, caplog: pytest.LogCaptureFixture) -> None:
    engine, trajectory = opened(machine), call(*range(9))
    machine.largest_batch = 9
    pixels = in_steps(host, Trajectory(trajectory.call))[1]
    with caplog.at_level(logging.INFO, "scm_runtime"):
        for _ in range(3):
            np.testing.assert_array_equal(whole(engine, Trajectory(trajectory.call))[0], pixels)
    message = "The memory of cuda:0 does not suffice for a batch of {}: batches of 9 are not padded to it any more."
    assert [record.getMessage() for record in caplog.records] == [message.format(10), message.format(12)]
    assert [sum(run.n == n for run in machine.runs) for n in (10, 12)] == [2, 2]
    with pytest.raises(OutOfMemoryError, match="batch of 11 in fp32"):
        whole(engine, call(*range(11)))
    whole(engine, call(1))
    engine.close()


def allocations_fail(engine: CudaEngine, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Let the next allocations of device memory fail."""
    stream, left = engine._context.stream, times
    allocate = stream.allocate

    def failing(nbytes: int) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OutOfMemoryError("the device is out of memory")
        return allocate(nbytes)

    monkeypatch.setattr(stream, "allocate", failing)


def test_memory_that_is_short_for_a_moment_changes_nothing(engine: CudaEngine, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole(engine, call(*range(12)))
    allocations_fail(engine, monkeypatch, 1)
    for n in (9, 10, 11, 12):
        whole(engine, call(*range(n)))
    assert engine.captured_batch_sizes == (10, 12)
    assert {run.n for run in machine.runs} == {10, 12}


def test_sizes_that_were_asked_for_or_captured_stay(engine: CudaEngine, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.run(lambda: engine.keep_batch_size(14))
    whole(engine, call(*range(10)))
    for n in (9, 13):
        with monkeypatch.context() as patch:
            allocations_fail(engine, patch, 2)
            in_steps(engine, call(*range(n)))
    machine.runs.clear()
    for n in (9, 13):
        whole(engine, call(*range(n)))
    assert {run.n for run in machine.runs} == {14}  # the graph of 10 is launched
    assert engine.captured_batch_sizes == (10, 14)


def test_a_result_on_the_device_is_kept_while_memory_is_short(engine: CudaEngine, machine: Machine, host: HostEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's result is in a buffer that is freed when memory runs out."""
    trajectory = call(*range(9))

    def job() -> Any:
        engine.start(trajectory)
        while not trajectory.done:
            engine.step([trajectory])
            trajectory.evaluations_done += 1
        engine._run_decoder([trajectory])
        allocations_fail(engine, monkeypatch, 1)
        return engine.decode_on_device(trajectory)

    array = engine.run(job)
    machine.allow_other_threads = True
    ready = array._buffer.ready_event.handle.latest
    ready.stream.execute_to(ready)
    found = machine.bytes_at(array._buffer.address, array._buffer.nbytes, queueing=False).view(array.dtype).reshape(array.shape)
    np.testing.assert_array_equal(found, in_steps(host, Trajectory(trajectory.call))[1])


def test_a_batch_is_tried_again_with_the_memory_of_the_first_attempt(engine: CudaEngine, machine: Machine) -> None:
    gc.collect()
    gc.disable()
    try:
        free, before, after = engine._batches._free_memory, list[int](), list[int]()

        def watched(trajectories: Sequence[Trajectory], size: int) -> None:
            before.append(machine.used)
            free(trajectories, size)
            after.append(machine.used)

        engine._batches._free_memory = watched  # type: ignore[method-assign]
        machine.largest_batch = 4
        with pytest.raises(OutOfMemoryError):
            whole(engine, call(*range(8)))
    finally:
        gc.enable()
    assert len(after) == 2
    assert all(before)
    assert not any(after)


def test_page_locked_memory_of_the_host_is_told_apart(engine: CudaEngine, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's memory is short, so smaller graphs or half precision do not help."""

    class Exhausted:
        def allocate(self, nbytes: int) -> Any:
            raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: unable to allocate enough memory")

    whole(engine, call(1))
    with monkeypatch.context() as patch:
        patch.setattr(engine._context.stream._core, "LegacyPinnedMemoryResource", Exhausted)
        with pytest.raises(OutOfMemoryError, match=r"no more page-locked memory: \d+ bytes") as raised:
            whole(engine, call(*range(9)))
    assert "cuda:0" not in str(raised.value)
    whole(engine, call(*range(9)))
    assert engine.captured_batch_sizes == (1, 10)


def test_a_shape_whose_capture_ran_out_of_memory_takes_no_place_of_a_graph(engine: CudaEngine, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_cache, "MAX_GRAPHS", 1)
    machine.no_memory_to_capture = {2}
    whole(engine, call(1, 2))
    whole(engine, call(1))
    assert engine.captured_batch_sizes == (1,)


def test_large_calls_are_evaluated_in_steps(engine: CudaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_call, "MAX_SAMPLE_EVALUATIONS", 8)
    assert engine.run(lambda: engine.sample([call(1, 2), call(3, 4)], ["pixels", "pixels"]))
    assert not engine.run(lambda: engine.sample([call(1, 2), call(3, 4, 5)], ["pixels", "pixels"]))


def test_a_failed_batch_leaves_no_memory_behind(engine: CudaEngine, machine: Machine) -> None:
    whole(engine, call(1))
    gc.collect()
    engine.run(engine._context.stream.free_deferred)
    used, machine.largest_batch = machine.used, 4
    with pytest.raises(OutOfMemoryError, match="batch of 8"):
        whole(engine, call(*range(8)))
    gc.collect()
    engine.run(engine._context.stream.free_deferred)
    assert machine.used == used


def test_a_terminated_capture_leaves_the_stream_usable(machine: Machine) -> None:
    engine = opened(machine)
    machine.terminates_capture = True
    with pytest.raises(GeneratorClosedError):
        whole(engine, call(1))
    assert not any(stream.capture for stream in machine.streams.values())
    engine.close()
    gc.collect()
    assert machine.used == 0


def test_close_frees_graphs_and_memory(machine: Machine) -> None:
    engine = opened(machine)
    whole(engine, call(1, 2))
    whole(engine, call(3), outputs=["state"])
    engine.close()
    gc.collect()
    assert all(graph.destroyed for graph in machine.graphs)
    assert (machine.used, machine.leaked, machine.pinned, machine.events) == (0, [], {}, [])


def test_the_parts_of_a_call_are_timed_by_its_graph(engine: CudaEngine) -> None:
    for _ in range(2):
        trajectory = call(1)
        whole(engine, trajectory)
        assert [part.name for part in trajectory.parts] == ["noise", "step", "step", "decode", "copy"]
        assert all(engine.elapsed(part.start, part.end) > 0 for part in trajectory.parts)
