"""``submit``, ``async_`` and ``stream``: which requests share a batch, samples do not depend on the batch, and errors reach only the request at fault."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from scheduler_control import TIMEOUT_S, engine_of, record_batches, scheduler_blocked, scheduler_threads, wait_until
from scm_runtime import (
    GenerationCancelledError,
    Generator,
    GeneratorClosedError,
    InferenceError,
    InvalidArgumentError,
    NonFiniteError,
    OutOfMemoryError,
    QueueFullError,
    Samples,
    Span,
)
from scm_runtime.sampling import scheduler
from scm_runtime.sampling.request_queue import RequestQueue
from support import native_library, run_python
from toy_bundle import WIDTH, write_text_bundle


@pytest.fixture
def digits() -> Iterator[Generator]:
    with Generator("digits", max_batch_size=8) as generator:
        yield generator


@pytest.fixture
def pair() -> Iterator[Generator]:
    """A Generator whose batches hold at most two samples."""
    with Generator("digits", max_batch_size=2) as generator:
        yield generator


@pytest.fixture
def text(tmp_path: Path) -> Iterator[Generator]:
    with Generator(write_text_bundle(tmp_path / "text")) as generator:
        yield generator


def embeds(tokens: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((tokens, WIDTH)).astype(np.float32)


def result(future: Future[Samples]) -> Samples:
    return future.result(TIMEOUT_S)


def three_timesteps(generator: Generator) -> list[float]:
    """Return times for three steps. The manifests in these tests have times for one and two steps only."""
    times = generator.manifest.times["2"]
    return [times[0], times[1], (times[1] + times[2]) / 2]


# ----------------------------------------------------------------------------
# Batching does not change the samples.


@pytest.mark.parametrize(("bundle", "native_ops"), [("digits", True), ("digits", False), ("tiny", True), ("tiny", False), ("text", False)])
def test_batching_with_requests_at_other_steps_does_not_change_a_bit(
    bundle: str, native_ops: bool, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one exception: without native kernels, ReduceMean over channels sums in another order at batch size 1 than at larger sizes.

    The difference measured over three steps is 2.4e-5 for digits, whose values reach 1.
    """
    paths: dict[str, str | Path] = {"digits": "digits", "tiny": tiny_bundle}
    path = paths.get(bundle) or write_text_bundle(tmp_path / "text")
    if native_ops:
        native_library()
    conditioning: dict[str, Any] = {"prompt_embeds": embeds(3)} if bundle == "text" else {}
    with Generator(path, max_batch_size=8, native_ops=native_ops) as generator:
        step_arguments: list[dict[str, Any]] = [{"num_inference_steps": 1}, {"num_inference_steps": 2}, {"timesteps": three_timesteps(generator)}]
        requests = [{"seed": 100 * n + 10 * i, "batch_size": n, **steps} for n in (1, 2, 3) for i, steps in enumerate(step_arguments)]
        batches = record_batches(generator, monkeypatch)
        futures: list[Future[Samples]] = []

        def submit_next(_: Generator, step: int, *__: object) -> None:
            """Submit one more request after each of the first two steps, so that the requests of a batch are at different steps."""
            if step < 2:
                futures.append(generator.submit(output_type="latent", **requests[len(futures)], **conditioning))

        with scheduler_blocked(generator, **conditioning):
            futures += [generator.submit(output_type="latent", **request, **conditioning) for request in requests[:-2]]
            first = generator.submit(seed=7, output_type="latent", callback_on_step_end=submit_next, **step_arguments[2], **conditioning)
        alone = generator(seed=7, output_type="latent", **step_arguments[2], **conditioning)
        pairs = [(result(first), alone)]
        pairs += [(result(future), generator(output_type="latent", **request, **conditioning)) for future, request in zip(futures, requests, strict=True)]
        assert any(len({k for _, k in batch}) > 1 for batch in batches), "requests at different steps must have shared an evaluation"
    for merged, called in pairs:
        assert merged.seeds == called.seeds
        if native_ops or len(called) > 1 or bundle == "text":
            np.testing.assert_array_equal(merged.array, called.array)
        else:
            np.testing.assert_allclose(merged.array, called.array, rtol=0, atol=1e-4)


def test_submit_returns_the_same_images_as_a_call(digits: Generator) -> None:
    with scheduler_blocked(digits):
        futures = [digits.submit([3, 1], seed=7), digits.submit([4], seed=9)]
    for future, called in zip(futures, (digits([3, 1], seed=7), digits([4], seed=9)), strict=True):
        merged = result(future)
        np.testing.assert_array_equal(merged.array, called.array)
        assert [image.tobytes() for image in merged.images] == [image.tobytes() for image in called.images]
        assert merged.conditioning["class_labels"].tolist() == called.conditioning["class_labels"].tolist()


@pytest.mark.parametrize("output_type", ["np", "latent", "dlpack"])
def test_samples_of_one_batch_do_not_keep_each_other_alive(digits: Generator, output_type: Any) -> None:
    with scheduler_blocked(digits):
        futures = [digits.submit(seed=i, output_type=output_type) for i in range(3)]
    for i, future in enumerate(futures):
        array = result(future).array
        assert array.base is None or array.base.nbytes == array.nbytes
        np.testing.assert_array_equal(array, digits(seed=i, output_type=output_type).array)


def test_latents_returned_by_a_callback_are_used(digits: Generator) -> None:
    def callback(_: Generator, step: int, t: float, state: dict[str, NDArray[np.float32]]) -> dict[str, Any] | None:
        return {"latents": state["latents"] * 0.5} if step == 0 else None

    with scheduler_blocked(digits):
        changed, other = digits.submit(seed=1, output_type="latent", callback_on_step_end=callback), digits.submit(seed=2, output_type="latent")
    np.testing.assert_array_equal(result(changed).array, digits(seed=1, output_type="latent", callback_on_step_end=callback).array)
    np.testing.assert_array_equal(result(other).array, digits(seed=2, output_type="latent").array)


def test_timings_and_spans_of_a_request() -> None:
    spans: list[Span] = []
    with Generator("digits", on_span=spans.append) as generator:
        with scheduler_blocked(generator):
            future = generator.submit(seed=5, num_inference_steps=2)
        samples = result(future)
    spans = [span for span in spans if spans.index(span) > next(i for i, one in enumerate(spans) if one.name == "generate")]
    whole = spans[-1]
    assert (whole.name, whole.attributes["num_inference_steps"]) == ("generate", 2)
    assert [span.name for span in spans].count("step") == len(samples.timings.steps) == 2
    assert all(whole.start_ns <= span.start_ns <= span.end_ns <= whole.end_ns + 5_000_000 for span in spans), "every part must lie within the whole"
    assert samples.timings.total >= sum(samples.timings.steps)


def test_an_error_in_on_span_reaches_the_future() -> None:
    def on_span(_: Span) -> None:
        raise ZeroDivisionError

    with Generator("digits", on_span=on_span) as generator, pytest.raises(ZeroDivisionError):
        result(generator.submit(seed=1))


# ----------------------------------------------------------------------------
# Which requests share a batch.


def test_waiting_requests_share_evaluations_and_leave_when_done(digits: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_batches(digits, monkeypatch)
    with scheduler_blocked(digits):
        futures = [digits.submit(seed=10 + steps, num_inference_steps=steps) for steps in (1, 2)]
        futures.append(digits.submit(seed=13, timesteps=three_timesteps(digits)))
    for future in futures:
        result(future)
    assert batches == [[(0, 0)], [(11, 0), (12, 0), (13, 0)], [(12, 1), (13, 1)], [(13, 2)]]


def test_a_new_request_joins_at_the_next_step(digits: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_batches(digits, monkeypatch)
    late: list[Future[Samples]] = []

    def callback(_: Generator, step: int, *__: object) -> None:
        if step == 0:
            late.append(digits.submit(seed=2))

    result(digits.submit(seed=1, callback_on_step_end=callback))
    result(late[0])
    assert batches == [[(1, 0)], [(1, 1), (2, 0)], [(2, 1)]]


def test_without_callbacks_each_evaluation_is_one_job_of_the_engine(digits: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each job is a switch to the engine's thread. The job of the last evaluation also decodes."""
    engine, jobs = engine_of(digits), []
    run = engine.run

    def count(job: Callable[[], Any]) -> Any:
        jobs.append(job)
        return run(job)

    with scheduler_blocked(digits):
        futures = [digits.submit(seed=seed) for seed in (1, 2)]
        monkeypatch.setattr(engine, "run", count)
    for future in futures:
        result(future)
    assert len(jobs) == 3, "one to decode the blocking request, and two evaluations"


def test_a_batch_holds_max_batch_size_samples(pair: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_batches(pair, monkeypatch)
    with scheduler_blocked(pair):
        futures = [pair.submit(seed=i, num_inference_steps=1) for i in (1, 2, 3)]
    for future in futures:
        result(future)
    assert batches[1:] == [[(1, 0), (2, 0)], [(3, 0)]]


def test_a_request_above_max_batch_size_runs_alone_and_is_not_postponed(pair: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_batches(pair, monkeypatch)
    with scheduler_blocked(pair):
        futures = [pair.submit(seed=1), pair.submit(seed=50, batch_size=5), *(pair.submit(seed=i) for i in (2, 3, 4))]
    sizes = [len(result(future)) for future in futures]
    assert sizes == [1, 5, 1, 1, 1]
    assert batches[1:] == [[(1, 0), (2, 0)], [(1, 1), (2, 1)], [(50, 0)], [(50, 1)], [(3, 0), (4, 0)], [(3, 1), (4, 1)]]


def test_callers_take_turns(pair: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(*seeds: int) -> list[Future[Samples]]:
        return [pair.submit(seed=seed, num_inference_steps=1) for seed in seeds]

    async def submit_in_task(seed: int) -> None:
        await pair.async_(seed=seed, num_inference_steps=1)

    batches = record_batches(pair, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        with scheduler_blocked(pair):
            futures = submit(*range(1, 7)) + pool.submit(submit, 20, 21).result()
            task = pool.submit(lambda: asyncio.run(submit_in_task(30)))
            wait_until(lambda: pair._scheduler._unfinished == 10)
        for future in futures:
            result(future)
        task.result(TIMEOUT_S)
    assert [[seed for seed, _ in batch] for batch in batches[1:]] == [[1, 20], [30, 2], [21, 3], [4, 5], [6]]


def test_embeddings_of_different_lengths_do_not_share_a_batch(text: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_batches(text, monkeypatch)
    with scheduler_blocked(text, prompt_embeds=embeds(2)):
        futures = [text.submit(prompt_embeds=embeds(tokens, i), seed=i, num_inference_steps=1, output_type="np") for i, tokens in ((1, 3), (2, 4), (3, 3))]
    arrays = [result(future).array for future in futures]
    assert batches[1:] == [[(1, 0), (3, 0)], [(2, 0)]]
    for i, tokens in ((1, 3), (2, 4), (3, 3)):
        called = text(prompt_embeds=embeds(tokens, i), seed=i, num_inference_steps=1, output_type="np")
        np.testing.assert_array_equal(arrays[i - 1], called.array)


def test_a_request_waits_max_wait_ms_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with Generator("digits", max_batch_size=2, max_wait_ms=1e6) as generator:
        batches = record_batches(generator, monkeypatch)
        first = generator.submit(seed=1, num_inference_steps=1)
        assert not wait([first], timeout=0.05).done, "it must wait for another request"
        result(generator.submit(seed=2, num_inference_steps=1))
        assert batches == [[(1, 0), (2, 0)]]


def test_a_request_runs_alone_after_max_wait_ms() -> None:
    with Generator("digits", max_wait_ms=1.0) as generator:
        assert len(result(generator.submit(seed=1))) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_batch_size", 0), ("max_batch_size", 2.0), ("max_wait_ms", -1), ("max_wait_ms", float("nan")), ("max_wait_ms", "1"), ("max_queue", 0)],
)
def test_batching_options_are_checked(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name} must be"):
        Generator("digits", **{name: value})


def test_a_full_queue_refuses_requests_until_one_is_finished() -> None:
    with Generator("digits", max_queue=2) as generator:
        with scheduler_blocked(generator):
            waiting = generator.submit(seed=1, output_type="np")
            with pytest.raises(QueueFullError, match="max_queue=2 requests are not finished"):
                generator.submit(seed=2)
            assert waiting.cancel()
        wait_until(lambda: not generator._scheduler._unfinished)
        later = [result(generator.submit(seed=seed, output_type="np")) for seed in range(5)]
        assert [samples.seeds for samples in later] == [(seed,) for seed in range(5)]
        stream = generator.stream(4, 1, seed=0, output_type="np")
        assert [samples.seeds for samples in stream] == [(0,), (1,), (2,), (3,)], "a stream has two requests at a time"


def test_a_thread_that_cannot_be_started_is_a_typed_error(digits: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Generator("digits") as generator:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(InferenceError, match="cannot start the thread that computes submitted requests: can't start new thread"):
                generator.submit(seed=1)
        assert result(generator.submit(seed=1)).seeds == (1,)


def test_submit_checks_arguments_before_it_returns(digits: Generator) -> None:
    with pytest.raises(InvalidArgumentError, match="class_labels must be from 0 to 9"):
        digits.submit(10)
    with pytest.raises(InvalidArgumentError, match="output_type must be"):
        digits.submit(output_type="jpeg")  # type: ignore[arg-type]  # invalid on purpose
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        digits.submit(steps=2)  # type: ignore[call-arg]  # invalid on purpose
    assert len(result(digits.submit(seed=1))) == 1


# ----------------------------------------------------------------------------
# Cancelling.


def test_a_request_cancelled_in_the_queue_is_never_computed(digits: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_batches(digits, monkeypatch)
    with scheduler_blocked(digits):
        unwanted, wanted = digits.submit(seed=1), digits.submit(seed=2)
        assert unwanted.cancel()
    assert len(result(wanted)) == 1
    assert all(seed != 1 for batch in batches for seed, _ in batch)
    with pytest.raises(CancelledError):
        unwanted.result()
    assert wait([unwanted], timeout=TIMEOUT_S).done, "wait() must see the cancellation"


def test_a_request_cancelled_between_steps_runs_no_further_step(digits: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_batches(digits, monkeypatch)
    futures: list[Future[Samples]] = []
    with scheduler_blocked(digits):
        futures.append(digits.submit(seed=1, callback_on_step_end=lambda *_: futures[0].cancel() and None))
        futures.append(digits.submit(seed=2))
    assert len(result(futures[1])) == 1
    assert batches[1:] == [[(1, 0), (2, 0)], [(2, 1)]]
    assert futures[0].cancelled()


def test_a_request_cancelled_after_its_last_step_is_not_decoded(digits: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = engine_of(digits).decode

    def count(trajectories: Sequence[Any]) -> Any:
        decoded.append(len(trajectories))
        return decode(trajectories)

    monkeypatch.setattr(engine_of(digits), "decode", count)
    futures: list[Future[Samples]] = []
    with scheduler_blocked(digits):
        futures.append(digits.submit(seed=1, num_inference_steps=1, callback_on_step_end=lambda *_: futures[0].cancel() and None))
    assert wait(futures, timeout=TIMEOUT_S).done
    assert len(result(digits.submit(seed=2))) == 1
    assert decoded == [1, 1], "the blocking request and the last request are decoded"


def test_a_finished_request_cannot_be_cancelled(digits: Generator) -> None:
    future = digits.submit(seed=1)
    result(future)
    assert not future.cancel()


def test_a_callback_that_returns_false_ends_only_its_request(digits: Generator) -> None:
    with scheduler_blocked(digits):
        ended, other = digits.submit(seed=1, callback_on_step_end=lambda *_: False), digits.submit(seed=2, output_type="np")
    with pytest.raises(GenerationCancelledError):
        result(ended)
    np.testing.assert_array_equal(result(other).array, digits(seed=2, output_type="np").array)


# ----------------------------------------------------------------------------
# Errors.


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, KeyboardInterrupt])
def test_an_error_in_a_callback_reaches_only_its_future(digits: Generator, error: type[BaseException]) -> None:
    def callback(*_: object) -> None:
        raise error

    with scheduler_blocked(digits):
        failed, other = digits.submit(seed=1, callback_on_step_end=callback), digits.submit(seed=2, output_type="np")
    with pytest.raises(error):
        result(failed)
    np.testing.assert_array_equal(result(other).array, digits(seed=2, output_type="np").array)


def make_fail(generator: Generator, method: str, monkeypatch: pytest.MonkeyPatch, error_for: Callable[[Sequence[Any]], Exception | None]) -> list[int]:
    """Patch a method of the engine to raise ``error_for(trajectories)`` unless that is None. Returns a list that records the samples per call."""
    engine, tried = engine_of(generator), []
    real = getattr(engine, method)

    def failing(trajectories: Sequence[Any]) -> Any:
        tried.append(sum(map(len, trajectories)))
        if error := error_for(trajectories):
            raise error
        return real(trajectories)

    monkeypatch.setattr(engine, method, failing)
    return tried


@pytest.mark.parametrize("method", ["step", "decode"])
def test_a_failing_evaluation_fails_only_the_request_that_causes_it(digits: Generator, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [digits(seed=i, output_type="np").array for i in range(5)]

    def error_for(trajectories: Sequence[Any]) -> Exception | None:
        return InferenceError("the thirteenth") if any(one.call.seeds[0] == 13 for one in trajectories) else None

    make_fail(digits, method, monkeypatch, error_for)
    with scheduler_blocked(digits):
        futures = [digits.submit(seed=i, output_type="np") for i in (0, 1, 13, 3, 4)]
    for i, future in enumerate(futures):
        if i == 2:
            with pytest.raises(InferenceError, match="the thirteenth"):
                result(future)
        else:
            np.testing.assert_array_equal(result(future).array, expected[i])


def test_a_nonfinite_sample_fails_only_its_request(digits: Generator) -> None:
    overflowing = np.full((1, *digits.manifest.sample.shape), 3e38, np.float32)
    with scheduler_blocked(digits):
        failed, other = digits.submit(seed=1, latents=overflowing), digits.submit(seed=2, output_type="np")
    with pytest.raises(NonFiniteError) as caught:
        result(failed)
    assert caught.value.seeds == (1,)
    np.testing.assert_array_equal(result(other).array, digits(seed=2, output_type="np").array)


@pytest.mark.parametrize("method", ["step", "decode"])
def test_batches_are_halved_when_memory_runs_out(digits: Generator, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [digits(seed=i, output_type="np").array for i in range(8)]
    tried = make_fail(digits, method, monkeypatch, lambda trajectories: OutOfMemoryError("full") if sum(map(len, trajectories)) > 2 else None)
    with scheduler_blocked(digits):
        futures = [digits.submit(seed=i, output_type="np") for i in range(8)]
    for future, called in zip(futures, expected, strict=True):
        np.testing.assert_array_equal(result(future).array, called)
    after = tried.index(8)
    assert tried[after : after + 7] == [8, 4, 2, 2, 4, 2, 2]
    assert max(tried[after + 7 :], default=0) <= 2, "a size that did not fit is not tried again"
    with pytest.raises(OutOfMemoryError):
        result(digits.submit(seed=0, batch_size=3))
    assert len(result(digits.submit(seed=0, batch_size=2))) == 2


def test_if_the_scheduler_fails_every_future_gets_an_error_and_the_next_request_starts_a_new_one(digits: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    original, errors_to_raise = RequestQueue.schedule, iter([ZeroDivisionError("internal")])

    def schedule(*arguments: Any) -> Any:
        if (error := next(errors_to_raise, None)) is not None:
            raise error
        return original(*arguments)

    with scheduler_blocked(digits):
        futures = [digits.submit(seed=i) for i in range(3)]
        monkeypatch.setattr(RequestQueue, "schedule", schedule)
    errors = []
    for future in futures:
        with pytest.raises(InferenceError, match="failed, ZeroDivisionError: internal") as caught:
            result(future)
        errors.append(caught.value)
    assert len({id(error) for error in errors}) == 3, "each future has its own error, because all tracebacks would accumulate in a shared one"
    assert len(result(digits.submit(seed=1))) == 1


# ----------------------------------------------------------------------------
# User code that runs in the scheduler's thread.


def test_a_done_callback_may_submit_call_and_close(digits: Generator) -> None:
    seen: list[Samples] = []
    done = threading.Event()

    def callback(_: Future[Samples]) -> None:
        following = digits.submit(seed=2)
        seen.append(digits(seed=3))
        digits.close()
        following.add_done_callback(lambda future: (seen.append(future.exception()), done.set()))  # type: ignore[arg-type, func-returns-value]  # a tuple runs both in a lambda

    with scheduler_blocked(digits) as first:
        first.add_done_callback(callback)
    assert done.wait(TIMEOUT_S)
    assert seen[0].seeds == (3,)
    assert isinstance(seen[1], GeneratorClosedError), "it was in the queue when the Generator was closed"


def test_a_done_callback_that_raises_does_not_affect_other_requests(digits: Generator) -> None:
    def callback(_: Future[Samples]) -> None:
        raise SystemExit

    with scheduler_blocked(digits) as first:
        first.add_done_callback(callback)
        other = digits.submit(seed=1)
    assert len(result(other)) == 1


def test_a_callback_may_call_the_generator_and_submit(digits: Generator) -> None:
    inner: list[Any] = []

    def callback(generator: Generator, step: int, *_: object) -> None:
        if step == 0:
            inner.extend([generator(seed=2, output_type="np"), generator.submit(seed=2, output_type="np")])

    result(digits.submit(seed=1, callback_on_step_end=callback))
    np.testing.assert_array_equal(inner[0].array, result(inner[1]).array)


# ----------------------------------------------------------------------------
# asyncio.


def test_concurrent_async_requests_return_their_samples(digits: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> list[Samples]:
        return await asyncio.gather(*(digits.async_(seed=i, output_type="np") for i in range(4)))

    for i, samples in enumerate(asyncio.run(main())):
        np.testing.assert_array_equal(samples.array, digits(seed=i, output_type="np").array)


def test_a_cancelled_task_cancels_its_request(digits: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_batches(digits, monkeypatch)

    async def main() -> None:
        with scheduler_blocked(digits):
            task = asyncio.ensure_future(digits.async_(seed=1))
            await asyncio.sleep(0)  # lets the task submit its request
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert len(result(digits.submit(seed=2))) == 1
    assert all(seed != 1 for batch in batches for seed, _ in batch)


def test_async_raises_the_same_error_as_a_call(digits: Generator) -> None:
    with pytest.raises(InvalidArgumentError, match="class_labels"):
        asyncio.run(digits.async_(10))


# ----------------------------------------------------------------------------
# Streams.


@pytest.mark.parametrize("batch_size", [1, 3, 8, 20, None])
def test_a_stream_returns_the_samples_of_one_call_at_any_batch_size(digits: Generator, batch_size: int | None) -> None:
    whole = digits(seed=5, batch_size=11, output_type="np")
    batches = list(digits.stream(11, batch_size, seed=5, output_type="np"))
    size = batch_size or 8
    assert [len(batch) for batch in batches] == [min(size, 11 - start) for start in range(0, 11, size)]
    assert tuple(seed for batch in batches for seed in batch.seeds) == whole.seeds
    np.testing.assert_array_equal(np.concatenate([batch.array for batch in batches]), whole.array)


def test_a_stream_with_arguments_for_each_image(text: Generator) -> None:
    given: dict[str, Any] = {
        "prompt_embeds": np.stack([embeds(4, i) for i in range(5)]),
        "guidance_scale": [1.0, 2.0, 3.0, 4.0, 5.0],
        "seed": [9, 7, 5, 3, 1],
        "latents": np.random.default_rng(0).standard_normal((5, 2, 4, 6)),
        "output_type": "latent",
    }
    whole = text(**given, conditioning={"score": 5.5}).array
    streamed = [batch.array for batch in text.stream(5, 2, **given, conditioning={"score": 5.5})]
    np.testing.assert_array_equal(np.concatenate(streamed), whole)


def test_a_stream_computes_one_batch_ahead(digits: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_batches(digits, monkeypatch)

    def started() -> int:
        return len({seed for batch in batches for seed, _ in batch})

    stream = digits.stream(50, 1, seed=100, output_type="np")
    assert started() == 0
    for i in range(5):
        assert next(stream).seeds == (100 + i,)
    result(digits.submit(seed=0))  # runs after all that was queued
    assert started() == 7, "five batches taken, one ahead, and the request above"
    stream.close()


def test_closing_a_stream_cancels_the_batch_ahead(digits: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_batches(digits, monkeypatch)
    stream = digits.stream(50, 1, seed=100, output_type="np", callback_on_step_end=lambda *_: None)
    next(stream)
    with scheduler_blocked(digits):
        next(stream)  # takes the batch ahead and queues another
        stream.close()
    result(digits.submit(seed=0))
    assert all(seed != 102 for batch in batches for seed, _ in batch)
    assert list(stream) == []


def test_deleting_a_stream_cancels_the_batch_ahead(digits: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_batches(digits, monkeypatch)
    stream = digits.stream(50, 1, seed=100, output_type="np")
    next(stream)
    with scheduler_blocked(digits):
        next(stream)
        del stream
    result(digits.submit(seed=0))
    assert all(seed != 102 for batch in batches for seed, _ in batch)


def test_a_stream_does_not_keep_batches_alive(digits: Generator) -> None:
    import gc
    import weakref

    stream = digits.stream(4, 1, seed=0, output_type="np")
    first = weakref.ref(next(stream))
    gc.collect()
    assert first() is None
    stream.close()


def test_an_error_ends_a_stream(digits: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    make_fail(digits, "step", monkeypatch, lambda trajectories: InferenceError("the second") if any(1 in one.call.seeds for one in trajectories) else None)
    stream = digits.stream(9, 1, seed=0)
    assert next(stream).seeds == (0,)
    with pytest.raises(InferenceError, match="the second"):
        next(stream)
    assert list(stream) == []


def test_stream_checks_arguments_before_the_first_batch(digits: Generator) -> None:
    with pytest.raises(InvalidArgumentError, match="num_images must be"):
        digits.stream(0)
    with pytest.raises(InvalidArgumentError, match="batch_size must be"):
        digits.stream(4, 0)
    with pytest.raises(InvalidArgumentError, match="class_labels must be one for all samples, or one for each of the 4, got 3"):
        digits.stream(4, class_labels=[1, 2, 3])
    with pytest.raises(InvalidArgumentError, match="seed must lie in"):
        digits.stream(4, seed=2**63 - 2)
    with pytest.raises(InvalidArgumentError, match="takes class_labels"):
        digits.stream(4, guidance_scale=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        digits.stream(4, steps=2)  # type: ignore[call-arg]  # invalid on purpose


# ----------------------------------------------------------------------------
# Imports and threads.


def test_importing_the_package_imports_no_asyncio_and_no_queues() -> None:
    program = """
import sys
import numpy
known = set(sys.modules)
import scm_runtime
new = {"asyncio", "concurrent.futures", "queue"} & (set(sys.modules) - known)
assert not new, new
"""
    run_python(program)


def test_no_scheduler_thread_before_the_first_submit() -> None:
    before = set(scheduler_threads())
    with Generator("digits") as generator:
        generator(seed=1)
        assert set(scheduler_threads()) <= before
        result(generator.submit(seed=1))
        assert len(set(scheduler_threads()) - before) == 1


def test_a_callback_runs_in_the_calling_thread_or_in_the_scheduler_thread(digits: Generator) -> None:
    threads: list[str] = []
    digits(seed=1, callback_on_step_end=lambda *_: threads.append(threading.current_thread().name))
    result(digits.submit(seed=1, callback_on_step_end=lambda *_: threads.append(threading.current_thread().name)))
    assert threads == [threading.current_thread().name] * 2 + [scheduler.THREAD_NAME] * 2
