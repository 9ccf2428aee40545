"""An export without trained weights. The consistency function of data N(mu, s^2) is known in closed form, so the samples must have that mean and deviation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scm_export.exporter import export_model
from scm_export.model import ImageDecoder, Model
from scm_export.options import Options
from scm_export.parametrisation import Step, default_times
from scm_runtime import Generator
from scm_runtime.bundle.manifest import Source

MEAN, STD, SIGMA_DATA = 0.3, 0.2, 0.5
SAMPLES = 10_000


class GaussianConsistency(nn.Module):
    """Network F of the exact solution of the probability-flow ODE for data N(MEAN, STD^2), which keeps the standard score of the state down to t = 0."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x * SIGMA_DATA
        cos, sin = t.cos()[:, None, None, None], t.sin()[:, None, None, None]
        score = (x - cos * MEAN) / torch.sqrt(cos**2 * STD**2 + sin**2 * SIGMA_DATA**2)
        return (cos * x - (MEAN + STD * score)) / (sin * SIGMA_DATA)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Model(
        family="gaussian",
        step=Step(GaussianConsistency(), SIGMA_DATA),
        sample_shape=(1, 1, 1),
        sigma_data=SIGMA_DATA,
        initial_scale=SIGMA_DATA,
        times=default_times(SIGMA_DATA),
        decoder=ImageDecoder(scale=255.0, offset=127.5),
    )
    source = Source(file="closed form", sha256="0" * 64)
    return export_model(model, tmp_path_factory.mktemp("analytic") / "gaussian.scm", source, Options()).path


@pytest.mark.parametrize("steps", [1, 2])
def test_samples_have_the_mean_and_standard_deviation_of_the_data(bundle: Path, steps: int) -> None:
    with Generator(bundle) as generate:
        x = generate(seed=0, batch_size=SAMPLES, num_inference_steps=steps, output_type="latent").array.astype("float64").ravel()
    assert abs(x.mean() - MEAN) < 3 * STD / math.sqrt(SAMPLES)
    assert abs(x.std(ddof=1) - STD) < 3 * STD / math.sqrt(2 * SAMPLES)


def test_the_second_step_draws_fresh_noise(bundle: Path) -> None:
    with Generator(bundle) as generate:
        one, two = (generate(seed=0, batch_size=500, num_inference_steps=steps, output_type="latent").array.ravel() for steps in (1, 2))
    correlation = float(torch.corrcoef(torch.tensor([one.tolist(), two.tolist()]))[0, 1])
    # At t = 1.1 the second step keeps cos(t) s of the first sample and adds sin(t) sigma_d of fresh noise.
    expected = math.cos(1.1) * STD / math.hypot(math.cos(1.1) * STD, math.sin(1.1) * SIGMA_DATA)
    assert correlation == pytest.approx(expected, abs=0.15)
