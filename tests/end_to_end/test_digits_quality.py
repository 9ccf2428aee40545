"""The evaluation of digits: its figures against SciPy and scikit-learn, its solver against the exporter's, and that it runs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy
import sklearn.neighbors
import torch
from click.testing import CliRunner
from torch import Tensor

from scm_export.networks.edm2 import UNet
from scm_export.samplers import make_tables
from scm_export.verification.ode_reference import sample_ode

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "digits"))

import evaluate
from data import SIGMA_DATA
from evaluate import FIGURES, main, measure_real
from judge import load_judge
from losses import Following
from metrics import frechet_distance, mean_and_interval, memorised, nearest, precision_recall
from samplers import T_MAX, bundle_noise, dpm_solver_2s, per_sample
from train import CONFIG
from trajectories import draw_trajectories


def points(seed: int, n: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator) @ torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) + shift


def test_the_frechet_distance_is_that_of_scipys_matrix_root() -> None:
    a, b = points(1, 400), points(2, 300, 0.3)
    covariances = [np.cov(x.double().numpy(), rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = float(((a.double().mean(0) - b.double().mean(0)) ** 2).sum()) + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1.5, 100.0])
def test_precision_and_recall_are_those_of_scikit_learns_neighbours(shift: float) -> None:
    real, drawn = points(1, 300), points(2, 250, shift)

    def share(x: torch.Tensor, manifold: torch.Tensor) -> float:
        distances, _ = sklearn.neighbors.NearestNeighbors(n_neighbors=4).fit(manifold.numpy()).kneighbors(manifold.numpy())
        apart = np.linalg.norm(x.numpy()[:, None] - manifold.numpy()[None], axis=2)
        return float((apart <= distances[:, 3]).any(axis=1).mean())

    assert precision_recall(real, drawn) == pytest.approx((share(drawn, real), share(real, drawn)))
    if shift == 100:
        assert precision_recall(real, drawn) == (0, 0)


def test_copies_are_found() -> None:
    training, held_out, others = points(1, 300), points(2, 200), points(3, 200)
    distances, _ = sklearn.neighbors.NearestNeighbors(n_neighbors=1).fit(training.numpy()).kneighbors(others.numpy())
    np.testing.assert_allclose(nearest(others, training), distances[:, 0], rtol=1e-3, atol=1e-3)
    honest = memorised(others, training, held_out)
    assert honest.copies < 0.05
    assert 0.8 < honest.median_ratio < 1.25
    copied = memorised(training[:100] + 1e-3, training, held_out)
    assert copied.copies == 1
    assert copied.median_ratio < 0.05


def test_intervals_are_those_of_students_t() -> None:
    values = [0.31, 0.29, 0.36]
    mean, half = mean_and_interval(values)
    low, high = scipy.stats.t.interval(0.95, 2, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-4)
    assert math.isnan(mean_and_interval([1.0])[1])


def test_the_teachers_solver_is_the_bundles() -> None:
    """samplers.py writes DPM-Solver-2S in predicted noise; scm_export's ODE reference, which the bundle's table is compared with, in denoised samples."""

    def network(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        del labels
        return torch.sin(2 * x + t.reshape(-1, 1, 1, 1))

    def step(x: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor, noise: torch.Tensor, conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
        del t_next, noise
        angle = t.reshape(-1, 1, 1, 1)
        return angle.cos() * x - angle.sin() * SIGMA_DATA * network(x / SIGMA_DATA, t, conditioning["class_labels"])

    labels, seeds = torch.arange(3), torch.arange(3)
    rows = make_tables(SIGMA_DATA, T_MAX)["dpm-solver-2s"][8]
    expected = sample_ode("dpm-solver-2s", rows, Step(step), bundle_noise(seeds)(0), SIGMA_DATA, SIGMA_DATA, {"class_labels": labels})
    torch.testing.assert_close(dpm_solver_2s(network, labels, 8, bundle_noise(seeds)), expected, rtol=1e-3, atol=1e-4)


class Step(torch.nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> torch.Tensor:
        return self.function(*arguments)


def test_quick_evaluation_runs_draws_no_set_twice_and_keeps_what_it_cannot_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for slow in (load_judge, measure_real):  # the same in both runs
        monkeypatch.setattr(evaluate, slow.__name__, cache(slow))

    def run(*arguments: str) -> tuple[str, Any]:
        done = CliRunner().invoke(main, ["--folder", str(tmp_path), "--quick", *arguments])
        assert done.exit_code == 0, done.output
        return done.output, json.loads((tmp_path / "results.json").read_text())

    names = ("sCD, 2 steps", "sCD, 1 step")
    of_another = {"sampler": "teacher of another run", "through": "fp32", "sets": 1, "figures": {name: [0.5, None] for name in FIGURES}}
    (tmp_path / "results.json").write_text(json.dumps({"samples": 100, "rows": [of_another]}))
    _, record = run("--only", "fp32")
    assert record["rows"].pop(0) == of_another
    assert [(row["sampler"], row["through"], row["sets"]) for row in record["rows"]] == [(name, "fp32", 1) for name in names]
    output, record = run("--only", "PyTorch")
    assert record["rows"].pop(0) == of_another
    assert "fp32/" not in output  # not drawn again
    figures = {(row["sampler"], row["through"]): row["figures"] for row in record["rows"]}
    assert list(figures) == [(name, through) for name in names for through in ("PyTorch", "fp32")]
    for name in names:
        assert figures[name, "fp32"]["near"][0] == pytest.approx(figures[name, "PyTorch"]["near"][0], rel=5e-3)
    assert record["export_changes"]["fp32"]["near"] < 5e-3
    assert (tmp_path / "side-by-side.png").is_file()


def test_trajectories_lead_where_the_data_are() -> None:
    """Data at one point c: F is known, and all trajectories end at c, whatever they begin with."""
    point = torch.linspace(-1, 1, 784).reshape(1, 1, 28, 28)

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert labels.shape == t.shape
        sin, cos = per_sample(t.double().sin()), per_sample(t.double().cos())
        z = (x.double() * SIGMA_DATA - cos * point) / sin
        return ((cos * z - sin * point) / SIGMA_DATA).float()

    torch.manual_seed(0)
    found = draw_trajectories(network, point, torch.tensor([3]), 300, torch.device("cpu"))
    assert found.x.shape == (300, 17, 1, 28, 28)
    assert (found.x[:, -1].float() - point).abs().max() < 2e-3
    assert (found.t.diff(dim=1) < 0).all()
    assert (found.t[:, -1] == 0).all()
    assert 0.5 < (found.t[:, 0] == T_MAX).float().mean() < 0.7
    assert (found.labels == 3).all()
    step = Following(UNet(CONFIG), found, compile=lambda function: function)
    loss = step.loss(point.expand(8, -1, -1, -1), torch.zeros(8), 0.0)
    assert math.isfinite(loss.item())
