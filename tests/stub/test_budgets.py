"""How much a call launches and copies: a change that adds launches, layout conversions or copies shows here."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import pytest

from scm_runtime import Generator
from stub.edm2 import Export
from stub.recording import Recording


class Budget(NamedTuple):
    """The most that a step of a batch of one may take."""

    launches: int
    transposes: int


BUDGETS: dict[Literal["fp16", "bf16"], Budget] = {
    "fp16": Budget(launches=230, transposes=2),
    "bf16": Budget(launches=230, transposes=6),  # ONNX Runtime has no channels-last kernels for it
}


@pytest.mark.parametrize("dtype", BUDGETS)
def test_a_step_of_edm2_stays_in_its_budget(dtype: Literal["fp16", "bf16"], edm2_xxs: Export, recording: Recording) -> None:
    with Generator(edm2_xxs(dtype), device="cuda", dtype=dtype) as generate:
        counts = {}
        for steps in (1, 2):
            for _ in range(2):
                generate(class_labels=3, seed=1, num_inference_steps=steps)
            recording.restart()
            generate(class_labels=3, seed=1, num_inference_steps=steps)
            counts[steps] = recording.launches()
            assert not recording.faults()
        nodes = generate.info.nodes
        assert generate.info.cuda_graph
    step = counts[2] - counts[1]
    budget = BUDGETS[dtype]
    assert step.total() <= budget.launches, step.most_common()
    assert sum(count for name, count in step.items() if "ranspose" in name) <= budget.transposes
    assert set(nodes) == {"CUDAExecutionProvider"}


@pytest.mark.parametrize("dtype", BUDGETS)
def test_a_repeated_call_uploads_and_downloads_once(dtype: Literal["fp16", "bf16"], edm2_xxs: Export, recording: Recording) -> None:
    call: dict[str, Any] = {"class_labels": 3, "num_inference_steps": 2}
    with Generator(edm2_xxs(dtype), device="cuda", dtype=dtype) as generate:
        for seed in range(3):
            generate(seed=seed, **call)
        recording.restart()
        generate(seed=3, **call)
        copies = recording.copies()
        assert copies["HD"] + copies["PD"] == 1
        assert copies["DH"] + copies["DP"] == 1
        assert recording.graph_launches() == 1
        assert len(recording.lines("sync")) <= 2
