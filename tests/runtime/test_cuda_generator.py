"""A Generator on a simulated CUDA machine (fake_cuda): calls, callbacks, batched requests, results on the device, samples repeated in fp32."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toy_text
from runtime.fake_cuda import PLACEMENT, FakeSession, Machine
from runtime.fake_cuda_driver import Capsule
from scheduler_control import TIMEOUT_S, engine_of, wait_until
from scm_runtime import GenerationTimeoutError, Generator, GeneratorClosedError, NonFiniteError, OutOfMemoryError, generator
from scm_runtime.bench.cells import CellRun
from scm_runtime.devices.placement import CPU
from scm_runtime.engines.cuda import stream as cuda
from scm_runtime.engines.cuda.dlpack import DeviceArray
from scm_runtime.engines.cuda.open_engine import open_cuda_engine
from scm_runtime.inputs.arguments import OutputType
from scm_runtime.ort.options import SessionSettings
from scm_runtime.ort.session import Session
from support import ROOT, run_python
from toy_bundle import SLOW_SCORE, SLOW_STEP, WIDTH, write_text_bundle

SEEDS = [1, 2, 3]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(cuda, "_import_cuda", made.modules)
    monkeypatch.setattr(generator, "resolve_device", lambda device, *_: PLACEMENT if device == "cuda" else CPU)
    assert open_cuda_engine.__kwdefaults__ is not None
    monkeypatch.setitem(open_cuda_engine.__kwdefaults__, "open_session", made.open_session)
    return made


def opened(bundle: str | Path = "digits", **options: Any) -> Generator:
    return Generator(bundle, device="cuda", native_ops=False, **{"dtype": "fp32", "cache_dir": False, **options})


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[Generator]:
    with Generator("digits", device="cpu", threads=1, native_ops=False) as generate:
        yield generate


def test_results_match_the_cpu(machine: Machine, on_cpu: Generator) -> None:
    with opened() as generate:
        for arguments in ({"seed": SEEDS}, {"class_labels": [7, 8], "seed": 3, "num_inference_steps": 1}, {"seed": SEEDS}):
            ours, theirs = generate(**arguments, output_type="np"), on_cpu(**arguments, output_type="np")
            np.testing.assert_array_equal(ours.array, theirs.array)
            assert ours.seeds == theirs.seeds
            assert len(ours.timings.steps) == len(theirs.timings.steps)
        np.testing.assert_array_equal(generate(seed=5, output_type="latent").array, on_cpu(seed=5, output_type="latent").array)
        assert generate.info.provider == on_cpu.info.provider  # the simulated sessions run on the CPU
    gc.collect()
    assert machine.used == 0


def test_optimized_graphs_are_loaded_from_the_cache(machine: Machine, on_cpu: Generator, tmp_path: Path) -> None:
    for _ in range(2):
        with opened(cache_dir=tmp_path) as generate:
            np.testing.assert_array_equal(generate(seed=SEEDS, output_type="np").array, on_cpu(seed=SEEDS, output_type="np").array)
        machine.threads.clear()
        machine.open = True


def test_callbacks_see_states_and_change_them(machine: Machine, on_cpu: Generator) -> None:
    def halved(_generator: Generator, step: int, t: float, tensors: dict[str, Any]) -> dict[str, Any] | None:
        seen.append((step, t, tensors["latents"].copy()))
        return {"latents": tensors["latents"] * np.float32(0.5)} if step == 0 else None

    results = []
    for generate in (opened(), on_cpu):
        seen: list[Any] = []
        results.append((generate(seed=SEEDS, output_type="np", callback_on_step_end=halved).array, seen))
    (ours, ours_seen), (theirs, theirs_seen) = results
    np.testing.assert_array_equal(ours, theirs)
    for (step, t, x), (other_step, other_t, other_x) in zip(ours_seen, theirs_seen, strict=True):
        assert (step, t) == (other_step, other_t)
        np.testing.assert_array_equal(x, other_x)


def test_results_stay_on_the_device_for_dlpack(machine: Machine) -> None:
    with opened() as generate:
        array = generate(seed=SEEDS, output_type="dlpack").array
        assert isinstance(array, DeviceArray)
        assert machine.to_host == [2 * 256]  # the flags of two steps, each padded
        assert isinstance(array.__dlpack__(stream=-1), Capsule)


AT_EXIT = """
import builtins
from runtime.fake_cuda import PLACEMENT, Machine
from runtime.fake_cuda_driver import Buffer
from scm_runtime import Generator, generator
from scm_runtime.engines.cuda import stream
from scm_runtime.engines.cuda.open_engine import open_cuda_engine

def close(self, stream=None, close=Buffer.close):
    import fractions  # cuda-core, too, imports modules while it frees memory
    close(self, stream)

machine, Buffer.close = Machine(), close
stream._import_cuda = machine.modules
generator.resolve_device = lambda *_: PLACEMENT
open_cuda_engine.__kwdefaults__["open_session"] = machine.open_session
generate = Generator("digits", device="cuda", dtype="fp32", native_ops=False, cache_dir=False)
results = [generate(seed=1, output_type="dlpack").array for _ in range(3)]
builtins.kept = results[0], results[1].__dlpack__()  # dropped last when Python ends
generate.close()
"""


def test_results_on_the_device_may_be_held_until_the_process_ends() -> None:
    done = run_python(AT_EXIT, env={**os.environ, "PYTHONPATH": str(ROOT / "tests")})
    assert (done.stdout, done.stderr) == ("", "")


def test_spans_and_timings_come_from_the_device(machine: Machine) -> None:
    spans: list[Any] = []
    with opened(on_span=spans.append) as generate:
        timings = generate(seed=1, output_type="np").timings
    assert timings.noise > 0
    assert all(step > 0 for step in timings.steps)
    assert {span.name for span in spans} >= {"generate", "noise", "step", "decode", "copy"}


def test_several_inputs_with_dynamic_dimensions(machine: Machine, tmp_path: Path) -> None:
    folder, random = write_text_bundle(tmp_path / "text.scm"), np.random.default_rng(0)
    with opened(folder) as ours, Generator(folder, device="cpu", threads=1) as theirs:
        for n, tokens in ((2, 3), (2, 5), (1, 3), (2, 3), (3, 1)):
            arguments: dict[str, Any] = {
                "prompt_embeds": random.standard_normal((n, tokens, WIDTH), np.float32),
                "prompt_attention_mask": np.arange(tokens) < random.integers(1, tokens + 1, (n, 1)),
                "guidance_scale": [float(i) for i in range(1, n + 1)],
                "seed": 5,
                "output_type": "np",
            }
            np.testing.assert_array_equal(ours(**arguments).array, theirs(**arguments).array)
        latents = ours.encode(theirs(**arguments).array)
        np.testing.assert_array_equal(latents, theirs.encode(theirs(**arguments).array))
        np.testing.assert_array_equal(ours.decode(latents, preview=True), theirs.decode(latents, preview=True))
    captures = dict(machine.opened)
    assert captures["step.fp32.onnx"]
    assert not any(capture for name, capture in captures.items() if name.startswith(("encode.", "preview.")))  # they run on host arrays


def test_prompts(machine: Machine, tmp_path: Path) -> None:
    with opened(toy_text.write_prompt_bundle(tmp_path / "text.scm")) as generate:
        generate.warmup()
        for prompts in (["a cat", "a dog"], ["a dog"]):
            expected = toy_text.sample(SEEDS[: len(prompts)], prompts)
            samples = generate(prompt=prompts, seed=1, output_type="latent")
            np.testing.assert_allclose(samples.array, expected, atol=1e-5)
            np.testing.assert_allclose(generate.submit(prompt=prompts, seed=1, output_type="latent").result().array, expected, atol=1e-5)
    assert dict(machine.opened)["text.fp32.onnx"] is False, "it runs on host arrays"


def test_latents_of_a_bundle_without_a_decoder_stay_on_the_device(machine: Machine, tmp_path: Path) -> None:
    folder = write_text_bundle(tmp_path / "latents.scm", decoder=False)
    with opened(folder) as generate:
        array = generate(prompt_embeds=np.ones((3, WIDTH)), seed=[1, 2], output_type="dlpack").array
        assert (array.dtype, array.shape) == (np.dtype(np.float32), (2, *generate.manifest.sample.shape))


def broken(machine: Machine, graph: str, corrupt: Callable[[Any], Any]) -> Callable[[Path, SessionSettings], Session]:
    """Return an ``open_session`` that opens sessions on the machine and applies ``corrupt`` to the results of one graph."""

    def open_session(path: Path, settings: SessionSettings) -> Session:
        session = machine.open_session(path, settings)
        if path.name == graph:

            class Corrupted(FakeSession):
                def __call__(self, **inputs: Any) -> Any:
                    return corrupt(np.array(super().__call__(**inputs)))

            session.__class__ = Corrupted
        return session

    return open_session


def overflown(x: Any) -> Any:
    if len(x) > 1:
        x[1] = np.inf
    return x


@pytest.fixture
def overflowing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The second sample of every fp16 step is infinite."""
    assert open_cuda_engine.__kwdefaults__ is not None
    monkeypatch.setitem(open_cuda_engine.__kwdefaults__, "open_session", broken(machine, "step.fp16.onnx", overflown))
    return machine


def test_overflow_raises_after_the_step_that_caused_it(overflowing: Machine) -> None:
    with opened(dtype="fp16", on_nonfinite="raise") as generate, pytest.raises(NonFiniteError) as raised:
        generate(seed=SEEDS, output_type="np")
    assert (raised.value.seeds, raised.value.step) == ((2,), 0)


def test_overflowing_samples_are_repeated_in_fp32(overflowing: Machine, on_cpu: Generator) -> None:
    with opened(dtype="fp16", on_nonfinite="fp32") as generate:
        drawn = generate(seed=SEEDS, output_type="latent").array
    expected = on_cpu(seed=SEEDS, output_type="latent").array
    np.testing.assert_allclose(drawn[1], expected[1], atol=1e-5)
    assert np.abs(drawn - expected).max() < 0.03
    gc.collect()
    assert overflowing.used == 0


def test_out_of_memory_leaves_a_working_generator(machine: Machine, on_cpu: Generator) -> None:
    with opened() as generate:
        machine.largest_batch = 4
        with pytest.raises(OutOfMemoryError, match="batch of 8"):
            generate(seed=0, batch_size=8)
        np.testing.assert_array_equal(generate(seed=SEEDS, output_type="np").array, on_cpu(seed=SEEDS, output_type="np").array)


def test_waiting_requests_are_batched(machine: Machine, on_cpu: Generator) -> None:
    asked: list[dict[str, Any]] = [{"seed": seed, "num_inference_steps": 1 + seed % 2} for seed in range(12)]
    with opened(max_wait_ms=20.0) as generate:
        futures = [generate.submit(**arguments, output_type="np") for arguments in asked]
        for arguments, future in zip(asked, futures, strict=True):
            np.testing.assert_array_equal(future.result(60).array, on_cpu(**arguments, output_type="np").array)
    assert max(run.n for run in machine.runs if run.graph == "step.fp32.onnx") > 1


def test_requests_that_begin_together_are_computed_in_one_graph(machine: Machine, on_cpu: Generator) -> None:
    with opened(max_wait_ms=2000.0, max_batch_size=9) as generate:
        kinds: list[OutputType] = ["np", "latent", "dlpack"]
        futures = [generate.submit(seed=seed, output_type=kinds[seed % 3]) for seed in range(9)]
        samples = [future.result(60) for future in futures]
        pixels, latents = (on_cpu(seed=0, batch_size=9, output_type=kind).array for kind in kinds[:2])
        for seed in (0, 3, 6):
            np.testing.assert_array_equal(samples[seed].array, pixels[seed : seed + 1])
            np.testing.assert_array_equal(samples[seed + 1].array, latents[seed + 1 : seed + 2])
            assert isinstance(samples[seed + 2].array, DeviceArray)
        assert [len(graph.runs) for graph in machine.graphs] == [8]  # three noise, two steps with their checks, and the decoder
        assert {run.n for run in machine.runs} == {9}
        del samples, futures
        gc.collect()


def test_a_request_with_a_callback_and_one_that_joins_it_are_evaluated_in_steps(machine: Machine, on_cpu: Generator) -> None:
    seen: list[int] = []
    with opened(max_wait_ms=2000.0, max_batch_size=2) as generate:
        observed = generate.submit(seed=1, output_type="np", callback_on_step_end=lambda _generator, step, t, tensors: seen.append(step))
        other = generate.submit(seed=2, output_type="np")
        for seed, future in ((1, observed), (2, other)):
            np.testing.assert_array_equal(future.result(60).array, on_cpu(seed=seed, output_type="np").array)
    assert seen == [0, 1]
    assert all(len(graph.runs) == 1 for graph in machine.graphs)


def test_warmup_captures_the_sizes_that_it_is_given(machine: Machine) -> None:
    with opened() as generate:
        assert generate.warmup((9, 2)) == (2, 9)
        machine.runs.clear()
        for n in (2, 9):
            generate(seed=list(range(n)), output_type="np")
        assert machine.runs == []
        generate(seed=SEEDS, output_type="np")
        assert generate.warmup() == (1, 2, 3, 9)


def test_large_batches_of_stream_are_captured(machine: Machine) -> None:
    with opened(max_batch_size=66) as generate:
        for _ in range(2):
            list(generate.stream(66, seed=0))
        assert [graph.launches for graph in machine.graphs] == [2]


def test_a_benchmark_captures_its_batch_sizes(machine: Machine) -> None:
    with opened() as generate:
        cell = CellRun(generate, 2, 9, {"seed": list(range(9)), "output_type": "np"})
        cell.warm_up()
        assert cell.error is None
    assert {run.n for run in machine.runs} == {9}
    assert machine.graphs


def test_a_request_that_is_cancelled_while_its_graph_runs_gets_no_result(machine: Machine, on_cpu: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    begins, late, run = threading.Event(), threading.Event(), FakeSession.__call__

    def announced(session: FakeSession, **inputs: Any) -> Any:
        begins.set()
        assert late.wait(TIMEOUT_S)
        return run(session, **inputs)

    with opened() as generate:
        generate.warmup((3,))
        monkeypatch.setattr(FakeSession, "__call__", announced)
        future = generate.submit(seed=SEEDS)
        assert begins.wait(TIMEOUT_S)
        assert future.cancel()
        late.set()
        np.testing.assert_array_equal(generate(seed=SEEDS, output_type="np").array, on_cpu(seed=SEEDS, output_type="np").array)


def test_decode_runs_outside_of_cuda_graphs(machine: Machine, on_cpu: Generator) -> None:
    latents = on_cpu(seed=SEEDS, output_type="latent").array
    with opened() as generate:
        np.testing.assert_array_equal(generate.decode(latents), on_cpu.decode(latents))


@pytest.mark.parametrize("submitted", [False, True])
def test_closing_ends_a_call_whose_work_is_on_the_stream(machine: Machine, submitted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begins, run = threading.Event(), FakeSession.__call__

    def announced(session: FakeSession, **inputs: Any) -> Any:
        if session.path.name.startswith("step"):
            begins.set()
        return run(session, **inputs)

    monkeypatch.setattr(FakeSession, "__call__", announced)
    generate = opened(write_text_bundle(tmp_path / "slow.scm", graphs={"step": SLOW_STEP}))
    thread = engine_of(generate)._context._jobs.thread
    arguments: dict[str, Any] = {"prompt_embeds": np.ones((3, WIDTH)), "conditioning": {"score": SLOW_SCORE}, "seed": SEEDS}
    with ThreadPoolExecutor(1) as pool:
        future = generate.submit(**arguments) if submitted else pool.submit(lambda: generate(**arguments))
        assert begins.wait(TIMEOUT_S)
        generate.close()
        with pytest.raises(GeneratorClosedError, match="while this call ran"):
            future.result(TIMEOUT_S)
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    del future
    gc.collect()
    assert machine.used == 0


@pytest.mark.parametrize("submitted", [False, True])
def test_a_call_ends_between_the_steps_on_the_stream(machine: Machine, submitted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that are queued on the stream run to their end, and these are few, although no step is waited for."""
    executed, late, run = list[str](), threading.Event(), FakeSession.__call__

    def counted(session: FakeSession, **inputs: Any) -> Any:
        if session.path.name.startswith("step"):
            executed.append(session.path.name)
            if len(executed) == 5:
                assert late.wait(TIMEOUT_S)
        return run(session, **inputs)

    arguments: dict[str, Any] = {"seed": SEEDS, "timesteps": [1.5 - i / 1000 for i in range(1000)]}
    with opened() as generate:
        generate(seed=SEEDS)
        monkeypatch.setattr(FakeSession, "__call__", counted)
        if submitted:
            future = generate.submit(**arguments)
            wait_until(lambda: len(executed) == 5)
            assert future.cancel()
            late.set()
        else:
            threading.Timer(1.0, late.set).start()
            with pytest.raises(GenerationTimeoutError):
                generate(**arguments, timeout=0.5)
        generate(seed=SEEDS)
    assert len(executed) < 20


def test_a_terminated_capture_leaves_the_stream_usable(machine: Machine) -> None:
    generate = opened()
    machine.terminates_capture = True
    with pytest.raises(GeneratorClosedError, match="while this call ran"):
        generate(seed=SEEDS)
    assert not any(stream.capture for stream in machine.streams.values())
    generate.close()
    gc.collect()
    assert machine.used == 0
