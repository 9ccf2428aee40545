"""diffusers' SCMScheduler, with this project's PyTorch network and noise, gives the same samples as this project's samplers."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from scm_export import ops
from scm_export.checkpoints import load_checkpoint
from scm_export.families import build_model
from scm_export.parametrisation import sample
from scm_export.verification.tolerances import sample_atol
from scm_runtime import Generator

pytest.importorskip("diffusers", reason="diffusers is in the test extra")
from diffusers import SCMScheduler

SEEDS, LABELS = [11, 12, 13], [0, 2, 3]


def sample_with_diffusers(checkpoint: Path) -> Tensor:
    """Sample two steps with SCMScheduler. Returns the denoised samples."""
    model = build_model(load_checkpoint(checkpoint))
    network = model.step.get_submodule("network")
    noises = [ops.philox_normal(torch.tensor(SEEDS), draw, model.sample_shape) for draw in range(3)]
    scheduler = SCMScheduler(prediction_type="trigflow", sigma_data=model.sigma_data)
    scheduler.set_timesteps(2, max_timesteps=model.times[2][0], intermediate_timesteps=model.times[2][1])
    x = noises[0] * scheduler.init_noise_sigma * model.sigma_data
    draws = iter(noises[1:])
    with torch.no_grad(), mock.patch("diffusers.schedulers.scheduling_scm.randn_tensor", side_effect=lambda *_, **__: next(draws)):
        for t in scheduler.timesteps[:-1]:
            F = network(x / model.sigma_data, t.expand(len(x)), class_labels=torch.tensor(LABELS))
            x, denoised = scheduler.step(model.sigma_data * F, t, x, return_dict=False)
    assert isinstance(denoised, Tensor)
    return denoised


def test_two_steps_equal_diffusers_scm_scheduler(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    expected = sample_with_diffusers(tiny_checkpoint)
    model = build_model(load_checkpoint(tiny_checkpoint))
    noises = [ops.philox_normal(torch.tensor(SEEDS), draw, model.sample_shape) for draw in range(3)]
    in_pytorch = sample(model.step, noises, model.times[2], model.initial_scale, {"class_labels": torch.tensor(LABELS)})
    torch.testing.assert_close(in_pytorch, expected, atol=1e-5, rtol=0)
    with Generator(tiny_bundle) as generate:
        found = generate(LABELS, seed=SEEDS, output_type="latent").array
    np.testing.assert_allclose(found, expected.numpy(), atol=sample_atol("fp32", "fp32"))
