"""Batches of any size run in the sizes that are captured, so that a new size neither captures nor builds plans for long."""

from __future__ import annotations

import random

from scm_runtime import Generator
from stub.recording import Recording

SIZES = range(1, 34)


def test_random_sizes_build_plans_for_captured_sizes_only(recording: Recording) -> None:
    with Generator("digits", device="cuda") as generate:
        generate(class_labels=1, seed=0)
        plans = recording.plans()  # of one size
        order = random.Random(0).sample([*SIZES] * 2, 2 * len(SIZES))
        for n in order:
            assert len(generate(class_labels=[1] * n, seed=0).array) == n
        sizes = len(recording.lines("instantiate"))
        assert recording.plans() <= plans * sizes
        recording.restart()
        for n in order:
            generate(class_labels=[1] * n, seed=0)
        assert not recording.lines("cudnn graph", "capture+", "instantiate")
