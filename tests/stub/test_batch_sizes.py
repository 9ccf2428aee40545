"""Batches of any size run in the sizes that are captured, so that a new size neither captures nor builds plans for long."""

from __future__ import annotations

import random

from scm_runtime import Generator
from stub.recording import Recording

SIZES = range(1, 34)
CAPTURED = 15  # 1…8, 10, 12, 16, 20, 24, 32 and 40


def test_random_sizes_build_plans_for_captured_sizes_only(recording: Recording) -> None:
    # In fp32, cuDNN computes the convolutions, and the stub's black images are not decoded again.
    with Generator("digits", device="cuda", dtype="fp32") as generate:
        generate(class_labels=1, seed=0)
        plans = recording.plans()  # of one size
        assert plans > 0
        order = random.Random(0).sample([*SIZES] * 2, 2 * len(SIZES))
        for n in order:
            assert len(generate(class_labels=[1] * n, seed=0).array) == n
        captures = len(recording.lines("instantiate"))
        assert captures <= CAPTURED
        assert recording.plans() <= plans * captures
        recording.restart()
        for n in order:
            generate(class_labels=[1] * n, seed=0)
        assert not recording.lines("cudnn graph", "capture+", "instantiate")
