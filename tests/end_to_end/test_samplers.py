"""Samplers of diffusion models: they match diffusers' schedulers and converge with second order. Also autoguidance, and errors for invalid requests."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from torch import Tensor

from conftest import write_tiny_checkpoint
from gaussian_networks import MEAN, SIGMA_DATA, STD
from scm_export import export
from scm_export.checkpoints import load
from scm_export.cli import main as scm_export
from scm_export.errors import CheckpointError
from scm_export.families import build_model
from scm_export.ops import philox_normal
from scm_export.samplers import SOLVERS, karras_sigmas
from scm_runtime import BundleSchemaError, GenerationCancelledError, Generator, InvalidArgumentError
from scm_runtime.cli import main as scm_runtime

SHAPE = (1, 2, 3)
SEEDS = (3, 4, 5, 6, 7)
STEPS = 8
Denoise = Callable[[Tensor, float], Tensor]


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    """A diffusion model of Gaussian data, whose posterior mean and ODE solution are known in closed form."""
    folder = tmp_path_factory.mktemp("gaussian")
    torch.save({"mean": torch.tensor(MEAN), "std": torch.tensor(STD)}, folder / "weights.pt")
    config = {
        "config": {"sample_shape": SHAPE, "arguments": {"parametrisation": "trigflow", "diffusion": True}},
        "sampler": {"solver": "ddim", "sigma_data": SIGMA_DATA},
    }
    (folder / "config.json").write_text(json.dumps(config))
    out = export(folder / "weights.pt", folder / "gaussian.scm", config=folder / "config.json", factory="gaussian_networks:make", steps=())
    with Generator(out.path) as generate:
        yield generate


@pytest.fixture(scope="module")
def guided(tiny_guided: tuple[Path, Path, Path]) -> Iterator[Generator]:
    with Generator(tiny_guided[0]) as generate:
        yield generate


def noise() -> Tensor:
    return philox_normal(torch.tensor(SEEDS), 0, SHAPE).double()


def denoised(X: Tensor, sigma: float) -> Tensor:
    """Return the posterior mean of the Gaussian data given ``X = x0 + sigma noise``."""
    return MEAN + (X - MEAN) * STD**2 / (STD**2 + sigma**2)


# ----------------------------------------------------------------------------
# diffusers' schedulers with EDM's noise levels. They expect data of unit scale, so states and noise levels are divided by sigma_d.


def sample_dpm_solver(algorithm: str) -> Tensor:
    """Sample with DPMSolverSinglestepScheduler. It alternates order 1 and 2 over a grid that also contains the evaluations between two steps."""
    levels = [sigma / SIGMA_DATA for sigma in karras_sigmas(STEPS)[:-1]]
    grid = [levels[0], *(level for a, b in pairwise(levels) for level in (math.sqrt(a * b), b))]
    final = "zero" if algorithm == "dpmsolver++" else "sigma_min"
    scheduler = diffusers.DPMSolverSinglestepScheduler(solver_order=2, algorithm_type=algorithm, prediction_type="sample", final_sigmas_type=final)
    scheduler.set_timesteps(len(grid))
    scheduler.sigmas, scheduler.order_list = torch.tensor([*grid, 0.0], dtype=torch.float64), [1, 2] * (len(levels) - 1) + [1]
    scheduler.set_begin_index(0)
    x = noise()  # variance-preserving: cos t data + sin t noise
    for level, t in zip(grid[:-1], scheduler.timesteps, strict=False):
        x = scheduler.step(unit_scale_denoised(x * math.hypot(1, level), level), t, x).prev_sample
    return unit_scale_denoised(x * math.hypot(1, grid[-1]), grid[-1]) * SIGMA_DATA


def sample_heun() -> Tensor:
    """Sample with HeunDiscreteScheduler."""
    levels = [sigma / SIGMA_DATA for sigma in karras_sigmas(STEPS)[:-1]]
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    sigmas = [levels[0], *(level for level in levels[1:] for _ in range(2)), 0.0]
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    scheduler.set_begin_index(0)
    evaluated = [levels[0], *(level for pair in pairwise(levels) for level in (pair[1], pair[1]))]
    X = noise() * math.hypot(1, levels[0])
    for level, t in zip(evaluated, scheduler.timesteps, strict=True):
        X = scheduler.step((X - unit_scale_denoised(X, level)) / level, t, X).prev_sample
    return X * SIGMA_DATA


def unit_scale_denoised(X: Tensor, level: float) -> Tensor:
    """Return the posterior mean for data, state and noise level divided by SIGMA_DATA."""
    return denoised(X * SIGMA_DATA, level * SIGMA_DATA) / SIGMA_DATA


DIFFUSERS = {"dpm-solver-2s": lambda: sample_dpm_solver("dpmsolver"), "dpm-solver++-2s": lambda: sample_dpm_solver("dpmsolver++"), "heun": sample_heun}


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("sampler", SOLVERS)
def test_samplers_match_diffusers_schedulers(gaussian: Generator, sampler: str) -> None:
    x = gaussian(seed=list(SEEDS), num_inference_steps=STEPS, sampler=sampler, output_type="latent").array
    np.testing.assert_allclose(x, DIFFUSERS[sampler]().numpy(), rtol=0, atol=2e-5)


def exact() -> NDArray[np.float64]:
    """Return the exact solution of the ODE: the distance from the mean, in standard deviations, is constant in time."""
    t = math.atan(80 / SIGMA_DATA)
    deviation = math.hypot(math.cos(t) * STD, math.sin(t) * SIGMA_DATA)
    solution: NDArray[np.float64] = (MEAN + STD * (noise() * SIGMA_DATA - math.cos(t) * MEAN) / deviation).numpy()
    return solution


def errors(generate: Generator, sampler: str | None, *counts: int) -> list[float]:
    """Return the largest error of a sampler for each number of steps."""
    return [float(np.abs(generate(seed=list(SEEDS), num_inference_steps=n, sampler=sampler, output_type="latent").array - exact()).max()) for n in counts]


@pytest.mark.parametrize("sampler", SOLVERS)
def test_samplers_converge_with_second_order(gaussian: Generator, sampler: str) -> None:
    coarse, fine = errors(gaussian, sampler, 8, 16)
    assert fine < coarse / 3  # second order divides the error by 4
    assert errors(gaussian, sampler, 32)[0] < errors(gaussian, None, 32)[0] / 3  # ddim


# ----------------------------------------------------------------------------
# Samplers in the interface of Generator and on the command line.


def test_two_evaluations_per_step_except_the_last(gaussian: Generator) -> None:
    for sampler in SOLVERS:
        for steps in gaussian.manifest.samplers[sampler]:
            samples = gaussian(seed=0, sampler=sampler, num_inference_steps=steps, output_type="latent")
            assert len(samples.timings.steps) == 2 * steps - 1
    assert len(gaussian(seed=0, sampler="heun", output_type="latent").timings.steps) == 63
    assert len(gaussian(seed=0, output_type="latent").timings.steps) == 32
    np.testing.assert_array_equal(gaussian(seed=0, sampler="ddim", output_type="latent").array, gaussian(seed=0, output_type="latent").array)


def test_warmup_passes_the_sampler_on(guided: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(Generator, "__call__", lambda _, **arguments: calls.append((arguments["sampler"], arguments["num_inference_steps"])))
    guided.warmup((1, 2), sampler="heun", num_inference_steps=8)
    assert calls == [("heun", 8)] * 2


def test_the_callback_is_called_once_per_step(gaussian: Generator) -> None:
    seen: list[tuple[int, float]] = []

    def callback(_: Generator, step: int, t: float, state: dict[str, Any]) -> dict[str, Any] | None:
        seen.append((step, t))
        return {"latents": np.zeros_like(state["latents"])} if step == 6 else None

    changed = gaussian(seed=[1, 2], sampler="heun", num_inference_steps=8, output_type="latent", callback_on_step_end=callback).array
    assert [step for step, _ in seen] == list(range(8))
    np.testing.assert_allclose([t for _, t in seen], [math.atan(sigma / SIGMA_DATA) for sigma in karras_sigmas(8)[:-1]])
    np.testing.assert_array_equal(changed[0], changed[1])  # both continue from the same state
    with pytest.raises(GenerationCancelledError, match="after step 3"):
        gaussian(seed=1, sampler="heun", num_inference_steps=8, callback_on_step_end=lambda _, step, *__: False if step == 2 else None)


def test_requests_with_different_samplers_share_batches_without_a_difference(guided: Generator) -> None:
    requests = [(sampler, steps, seed) for seed, sampler in enumerate((None, "heun", "dpm-solver-2s", "dpm-solver++-2s")) for steps in (8, 16)]
    futures = [guided.submit(seed=[seed, seed + 50], sampler=sampler, num_inference_steps=steps, output_type="latent") for sampler, steps, seed in requests]
    for (sampler, steps, seed), future in zip(requests, futures, strict=True):
        alone = guided(seed=[seed, seed + 50], sampler=sampler, num_inference_steps=steps, output_type="latent").array
        np.testing.assert_array_equal(future.result(60).array, alone)


def test_a_consistency_model_has_no_other_sampler(tiny: Generator) -> None:
    with pytest.raises(InvalidArgumentError, match=r"must be 'consistency', or None: 'tiny' is a consistency model.*Got 'heun'.*teacher"):
        tiny(sampler="heun")
    np.testing.assert_array_equal(tiny(seed=1, sampler="consistency").array, tiny(seed=1).array)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "euler"}, "sampler must be one of ddim, dpm-solver-2s, .*, got 'euler'"),
        ({"sampler": 3}, "got 3"),
        ({"sampler": "heun", "num_inference_steps": 7}, r"must be one of \[8, 16, 32, 64\].*got 7"),
        ({"sampler": "heun", "num_inference_steps": 0}, "at least 1"),
        ({"sampler": "heun", "timesteps": [1.0]}, "timesteps are for the sampler 'ddim'"),
    ],
)
def test_unknown_samplers_and_step_counts(gaussian: Generator, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        gaussian(**arguments)


@pytest.mark.parametrize(
    "content",
    [b"{", b"{}", b'{"dpm-solver-2s": {"8": []}}', None],
    ids=["no JSON", "empty", "no rows", "starts in the middle"],
)
def test_a_damaged_table_of_coefficients(gaussian: Generator, tmp_path: Path, content: bytes | None) -> None:
    folder = shutil.copytree(gaussian.folder, tmp_path / "damaged.scm")
    if content is None:
        tables = json.loads((folder / "samplers.json").read_text())
        first, second, *_ = tables["heun"]["8"]
        first[2], second[2] = second[2], None
        content = json.dumps(tables, separators=(",", ":")).encode()
    (folder / "samplers.json").write_bytes(content.ljust((folder / "samplers.json").stat().st_size))
    with Generator(folder, verify_integrity=False) as generate:
        with pytest.raises(BundleSchemaError, match=r"samplers\.json' does not fit the bundle.*Export the checkpoint again"):
            generate(sampler="heun")
        generate(seed=1, output_type="latent")  # ddim needs no table


def test_sampler_option_of_the_command_line(tiny_guided: tuple[Path, Path, Path], tmp_path: Path) -> None:
    command = ["generate", str(tiny_guided[0]), "--sampler", "heun", "--steps", "8", "--seed", "1", "-o", str(tmp_path / "a.png")]
    done = CliRunner().invoke(scm_runtime, command)
    assert done.exit_code == 0, done.output
    assert "15 evaluations by heun" in done.output
    assert (tmp_path / "a.png").exists()


# ----------------------------------------------------------------------------
# Autoguidance.


def test_a_guided_bundle_combines_the_two_networks(tiny_guided: tuple[Path, Path, Path]) -> None:
    bundle, teacher, guide = tiny_guided
    networks: Any = [build_model(load(path)).step.network for path in (teacher, guide)]
    main, guide_network = networks
    scale, labels = torch.tensor([1.0, 2.0, 3.5]), torch.tensor([0, 1, 3])
    x, t = philox_normal(torch.tensor([5, 6, 7]), 0, (3, 8, 8)), 1.2
    with torch.no_grad():
        F, G = main(x, torch.full((3,), t), labels), guide_network(x, torch.full((3,), t))
    expected = math.cos(t) * 0.5 * x - math.sin(t) * 0.5 * (G + scale.reshape(-1, 1, 1, 1) * (F - G))

    def check_latents(_: Generator, __: int, ___: float, state: dict[str, Any]) -> None:
        np.testing.assert_allclose(state["latents"], expected.numpy(), rtol=0, atol=1e-5)

    guided = Generator(bundle, session_options={"scm.float32_matmul_precision": "highest"})  # the default of PyTorch
    guided(labels.tolist(), seed=[5, 6, 7], timesteps=[t], guidance_scale=scale.tolist(), callback_on_step_end=check_latents)
    assert guided.manifest.source.guide is not None
    assert guided.manifest.source.guide.file == "guide.pt"
    np.testing.assert_array_equal(guided(seed=1).array, guided(seed=1, guidance_scale=2.0).array)


@pytest.mark.parametrize(
    ("checkpoint", "guide", "message"),
    [
        ({}, {"diffusion": True}, "a guide is for a diffusion model"),
        ({"diffusion": True}, {"diffusion": True, "img_resolution": 16}, "the img_resolution of the guided model, 8, got 16"),
        ({"diffusion": True}, {"diffusion": True, "label_dim": 3}, "the label_dim of the guided model, 4, got 3"),
    ],
)
def test_guides_that_do_not_match_the_model(tmp_path: Path, checkpoint: dict[str, Any], guide: dict[str, Any], message: str) -> None:
    teacher = write_tiny_checkpoint(tmp_path / "teacher.pt", **checkpoint)
    guide_path = write_tiny_checkpoint(tmp_path / "guide.pt", **guide)
    with pytest.raises(CheckpointError, match=message):
        export(teacher, tmp_path / "out.scm", guide=guide_path)
    assert not (tmp_path / "out.scm").exists()


def test_a_missing_guide(tmp_path: Path) -> None:
    teacher = write_tiny_checkpoint(tmp_path / "teacher.pt", diffusion=True)
    done = CliRunner().invoke(scm_export, [str(teacher), "--guide", str(tmp_path / "none.pt")])
    assert done.exit_code == 2
    assert "no checkpoint at" in done.output
    assert "none.pt" in done.output
