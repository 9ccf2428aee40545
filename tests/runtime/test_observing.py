"""Observing and tuning a Generator: spans, timings, profiles, session options, memory errors, warmup, and DLPack on the CPU."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch.utils.dlpack

import toy_bundle
from scm_runtime import DeviceError, Generator, InvalidArgumentError, OutOfMemoryError, Span
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.ort.open_session import open_session
from scm_runtime.ort.options import SessionSettings

onnxruntime = load_onnxruntime()

# ----------------------------------------------------------------------------
# Spans.


def test_spans_cover_the_call_in_order(tiny_bundle: Path) -> None:
    spans: list[Span] = []
    with Generator(tiny_bundle, device="cpu", on_span=spans.append) as generate:
        before = time.time_ns()
        samples = generate(seed=1, batch_size=3)
        after = time.time_ns()
    assert [span.name for span in spans] == ["noise", "noise", "step", "noise", "step", "decode", "generate"]
    whole = spans[-1]
    assert whole.attributes == {"bundle": "tiny", "device": "cpu", "dtype": "fp32", "batch_size": 3, "num_inference_steps": 2}
    assert [span.attributes for span in spans if span.name == "step"] == [{"step": 0}, {"step": 1}]
    slack = 20_000_000  # in ns: spans and this test read different clocks
    assert before - slack <= whole.start_ns <= whole.end_ns <= after + slack
    for earlier, later in itertools.pairwise(spans[:-1]):
        assert whole.start_ns - slack <= earlier.start_ns <= earlier.end_ns <= later.start_ns + 1000
    assert abs(sum(span.end_ns - span.start_ns for span in spans if span.name == "step") / 1e9 - sum(samples.timings.steps)) < 1e-6


def test_a_failed_call_reports_no_spans(tiny_bundle: Path) -> None:
    spans: list[Span] = []
    with Generator(tiny_bundle, on_span=spans.append) as generate, pytest.raises(InvalidArgumentError):
        generate(9)
    assert not spans


def test_callbacks_must_be_functions(tiny: Generator, tiny_bundle: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="on_span must be a function"):
        Generator(tiny_bundle, on_span=cast(Any, 3))
    with pytest.raises(InvalidArgumentError, match="callback_on_step_end must be a function"):
        tiny(seed=1, callback_on_step_end=cast(Any, 3))


def test_timings_contain_the_time_in_the_queue(tiny_bundle: Path) -> None:
    with Generator(tiny_bundle, max_wait_ms=80) as generate:
        alone = generate.submit(seed=1).result().timings
    assert 0.05 < alone.waited < alone.total


def test_copying_takes_no_time_on_the_host(tiny: Generator) -> None:
    assert tiny(seed=1).timings.copy == 0


# ----------------------------------------------------------------------------
# ONNX Runtime's own profile and options.


def test_profiles_are_written_on_closing(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "profiles"
    with Generator(tiny_bundle, profile_dir=folder) as generate:
        generate(seed=1)
    names = sorted(path.name.split("_")[0] for path in folder.iterdir())
    assert names == ["decode.fp32", "noise", "step.fp32"]
    events = json.loads(next(folder.glob("step.fp32*")).read_text())
    assert sum(event["name"] == "model_run" for event in events) == 2


def test_a_profile_folder_that_is_a_file(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgumentError, match=r"profile_dir must be a folder that can be written to, got '.*file'"):
        Generator(tiny_bundle, profile_dir=tmp_path / "file")


def test_session_options_reach_onnxruntime(tiny_bundle: Path) -> None:
    options = {"enable_mem_pattern": True, "graph_optimization_level": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, "session.disable_prepacking": "1"}
    session = open_session(tiny_bundle / "step.fp32.onnx", SessionSettings(session_options=options))
    opened = session._session.get_session_options()
    assert opened.enable_mem_pattern is True  # the default of scm-runtime is False
    assert opened.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert opened.get_session_config_entry("session.disable_prepacking") == "1"


def test_a_session_option_overrides_the_default_silently(tiny_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    default = open_session(tiny_bundle / "step.fp32.onnx", SessionSettings())._session.get_session_options()
    assert default.get_session_config_entry("session.intra_op.spin_duration_us") == "20"
    assert default.get_session_config_entry("session.force_spinning_stop") == "1"
    assert default.enable_mem_pattern is False
    with Generator(tiny_bundle, device="cpu", session_options={"session.intra_op.allow_spinning": 0}) as generate:
        generate(0, seed=0)
    overridden = open_session(
        tiny_bundle / "step.fp32.onnx", SessionSettings(session_options={"session.intra_op.allow_spinning": 0})
    )._session.get_session_options()
    assert overridden.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"intra_op_threads": 2}, r"SessionOptions \(.*intra_op_num_threads.*got 'intra_op_threads'"), ({"intra_op_num_threads": "two"}, "cannot be 'two'")],
    ids=["unknown", "type"],
)
def test_invalid_session_options(tiny_bundle: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Generator(tiny_bundle, session_options=options)


def test_a_session_on_another_provider_is_an_error(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda _: ["AzureExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(DeviceError, match=r"to open '.*noise\.onnx' on CPUExecutionProvider and opened it on AzureExecutionProvider\. scm-runtime doctor"):
        Generator(tiny_bundle, device="cpu")


def test_out_of_memory_leaves_the_generator_usable() -> None:
    with Generator("digits", device="cpu") as generate:
        for size in (2**24, 2**40):  # 50 GB of noise, and more seeds than fit into memory
            with pytest.raises(OutOfMemoryError, match=r"[Ss]maller batch"):
                generate(seed=0, batch_size=size)
        assert len(generate(seed=0, batch_size=2)) == 2


# ----------------------------------------------------------------------------
# Warmup and DLPack.


def test_warmup_runs_every_batch_size_with_placeholder_embeddings(tmp_path: Path) -> None:
    spans: list[Span] = []
    with Generator(toy_bundle.write_text_bundle(tmp_path / "text.scm"), device="cpu", on_span=spans.append) as generate:
        generate.warmup(batch_sizes=(1, 4), num_inference_steps=1)
        whole = [span.attributes for span in spans if span.name == "generate"]
        assert [(call["batch_size"], call["num_inference_steps"]) for call in whole] == [(4, 1), (1, 1)]
        generate.warmup(conditioning={"prompt_embeds": np.zeros((9, toy_bundle.WIDTH))})


@pytest.mark.parametrize("sizes", [(), (0,), (1.5,), ("1",), 4, None], ids=repr)
def test_invalid_batch_sizes_of_warmup(tiny: Generator, sizes: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="batch_sizes must be a list of integers of at least 1, got"):
        tiny.warmup(sizes)


def test_torch_reads_dlpack_samples_without_a_copy(tiny: Generator) -> None:
    samples = tiny(seed=5, batch_size=2, output_type="dlpack")
    tensor = torch.utils.dlpack.from_dlpack(samples.array)
    assert tensor.data_ptr() == samples.array.ctypes.data
    np.testing.assert_array_equal(tensor.numpy(), tiny(seed=5, batch_size=2, output_type="np").array)


def test_images_of_samples_on_a_gpu(tiny: Generator) -> None:
    samples = tiny(seed=5, output_type="np")
    object.__setattr__(samples, "array", cast(Any, object()))
    with pytest.raises(InvalidArgumentError, match="are on the GPU: use output_type='pil' or 'np'"):
        _ = samples.images
    assert len(samples) == 1
