"""The embedded digits model: it matches the checkpoint in the repository and still generates the golden images."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from both_ways import check_both_ways
from scm_export import ops
from scm_export.checkpoints import load_checkpoint
from scm_export.families import build_model
from scm_export.parametrisation import sample
from scm_runtime import Generator

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "examples" / "digits" / "digits.pt"
GOLDEN = ROOT / "tests" / "golden"
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def test_the_embedded_bundle_was_exported_from_the_checkpoint_in_the_repository() -> None:
    with Generator("digits") as generate:
        assert generate.manifest.source.sha256 == hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()
        assert generate.manifest.verification is not None


def test_the_committed_quality_figures_are_of_this_checkpoint_and_good_enough() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())
    rows = {(row["sampler"], row["through"]): row for row in record["rows"]}
    assert {row["checkpoint_sha256"] for row in rows.values() if row["sampler"].startswith("sCD")} == {hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()}
    for through in ("PyTorch", "fp32", "fp16"):
        one, two = (rows[name, through]["figures"] for name in ("sCD, 1 step", "sCD, 2 steps"))
        assert one["recognised"][0] >= 0.80
        assert two["recognised"][0] >= 0.85
        assert two["frechet"][0] <= 1.1 * rows["teacher with autoguidance, 63 evaluations", "fp32"]["figures"]["frechet"][0]


def test_every_graph_opens_with_and_without_the_native_library() -> None:
    check_both_ways(ROOT / "scm_runtime" / "bundles" / "digits.scm")


@pytest.mark.parametrize("steps", [1, 2])
def test_golden_digits(steps: int) -> None:
    golden = np.array(Image.open(GOLDEN / f"digits-{steps}-step.png"))
    with Generator("digits") as generate:
        images = generate(NAMES, seed=0, num_inference_steps=steps, output_type="np").array
    # Rounding differs between processors by at most two of 255 levels.
    np.testing.assert_allclose(np.concatenate(images[..., 0], axis=1).astype(int), golden.astype(int), atol=2)


def test_same_seed_same_bits_in_any_batch_and_order() -> None:
    with Generator("digits") as generate:
        alone = {seed: generate(seed=seed, output_type="latent").array[0] for seed in range(13)}
        for seeds in (list(range(7)), list(range(12, -1, -1)), [5, 5, 1]):
            together = generate(seed=seeds, output_type="latent").array
            np.testing.assert_array_equal(together, np.stack([alone[seed] for seed in seeds]))


def test_the_bundle_generates_the_same_images_as_the_checkpoint_in_pytorch() -> None:
    model = build_model(load_checkpoint(CHECKPOINT))
    seeds, labels = list(range(50, 60)), list(range(10))
    noises = [ops.philox_normal(torch.tensor(seeds), draw, model.sample_shape) for draw in range(3)]
    x = sample(model.step, noises, model.times[2], model.initial_scale, {"class_labels": torch.tensor(labels)})
    expected = model.decode(x).numpy().astype(int)
    with Generator("digits") as generate:
        found = generate(labels, seed=seeds, output_type="np").array.astype(int)
    # The bundle stores its weights in half precision, with normalization and gains folded in.
    difference = np.abs(found - expected)
    assert difference.max() <= 8
    assert difference.mean() < 0.1
