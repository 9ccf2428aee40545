"""A Gaussian model gives the same samples in all five parametrisations: compared after an export, with closed forms and with diffusers' schedulers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gaussian_networks import MEAN, NETWORKS, SIGMA_DATA, STD, Gaussian
from scm_export import export
from scm_export.checkpoints import SamplerSpec
from scm_export.choices import ParametrisationName
from scm_export.ops import philox_normal
from scm_export.parametrisation import PARAMETRISATIONS, Step, ddim_step, sample
from scm_runtime import Generator

SHAPE = (1, 2, 3)
TIMES = (1.55, 1.1, 0.6, 0.0)
SEEDS = (3, 4, 5, 6, 7)


def test_every_parametrisation_has_a_network_here() -> None:
    assert NETWORKS.keys() == PARAMETRISATIONS.keys()


def network(parametrisation: str, *, diffusion: bool = False) -> Gaussian:
    made = NETWORKS[parametrisation](diffusion)
    made.load_state_dict({"mean": torch.tensor(MEAN), "std": torch.tensor(STD)})
    return made.double().requires_grad_(False)


# ----------------------------------------------------------------------------
# End to end: weights and a config, through the exporter and the runtime.


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Function that exports the Gaussian for (parametrisation, solver): its consistency function, or its posterior mean for ddim."""
    folder = tmp_path_factory.mktemp("gaussian")
    torch.save({"mean": torch.tensor(MEAN), "std": torch.tensor(STD)}, folder / "weights.pt")

    def make(parametrisation: str, solver: str) -> Path:
        out = folder / f"{parametrisation}-{solver}.scm"
        if not out.exists():
            arguments = {"parametrisation": parametrisation, "diffusion": solver == "ddim"}
            times = {"1": (TIMES[0], 0.0), "2": (TIMES[0], 1.1, 0.0), "3": TIMES}
            config = {
                "config": {"sample_shape": SHAPE, "arguments": arguments},
                "sampler": {"parametrisation": parametrisation, "solver": solver, "sigma_data": SIGMA_DATA, "times": times},
            }
            path = folder / f"{parametrisation}-{solver}.json"
            path.write_text(json.dumps(config))
            export(folder / "weights.pt", out, config=path, factory="gaussian_networks:make", steps=(), verify=False)
        return out

    return make


def noise(draw: int) -> NDArray[np.float64]:
    return np.asarray(philox_normal(torch.tensor(SEEDS), draw, SHAPE).numpy(), np.float64)


def score(x: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    """Deviation of the state from the mean in units of its standard deviation, which the exact ODE conserves."""
    return (x - math.cos(t) * MEAN) / deviation(t)


def deviation(t: float) -> float:
    return math.hypot(math.cos(t) * STD, math.sin(t) * SIGMA_DATA)


def consistency_samples(steps: int) -> NDArray[np.float64]:
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1): jump to the end of the ODE and add fresh noise."""
    x, times = noise(0) * SIGMA_DATA, TIMES[:steps]
    for k, t in enumerate(times):
        data = MEAN + STD * score(x, t)
        t_next = (*times, 0.0)[k + 1]
        x = math.cos(t_next) * data + math.sin(t_next) * SIGMA_DATA * noise(k + 1)
    return x


def ddim_samples(steps: int) -> NDArray[np.float64]:
    """DDIM in EDM's variables, where it is Euler's method: ``x + (sigma' - sigma) (x - D) / sigma`` (arXiv 2206.00364, equation 4)."""
    times = (*TIMES[:steps], 0.0)
    x = noise(0) * SIGMA_DATA / math.cos(times[0])
    for sigma, sigma_next in pairwise(SIGMA_DATA * math.tan(t) for t in times):
        data = MEAN + (x - MEAN) * STD**2 / (STD**2 + sigma**2)
        x = x + (sigma_next - sigma) * (x - data) / sigma
    return x


CLOSED_FORMS = {"consistency": consistency_samples, "ddim": ddim_samples}
EXPORTED = [*((name, "consistency") for name in NETWORKS), ("trigflow", "ddim"), ("edm", "ddim")]  # each takes seconds


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize(("parametrisation", "solver"), EXPORTED)
def test_the_same_samples_in_every_parametrisation(bundle: Callable[[str, str], Path], parametrisation: str, solver: str, steps: int) -> None:
    with Generator(bundle(parametrisation, solver)) as generate:
        x = generate(seed=list(SEEDS), num_inference_steps=steps, output_type="latent").array
    # Rounding in float32: at sigma 24, EDM's c_in x is of the order of 1, and c_out F and c_skip x of the network above cancel.
    np.testing.assert_allclose(x, CLOSED_FORMS[solver](steps), rtol=0, atol=2e-5 if parametrisation == "edm" else 2e-6)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("parametrisation", NETWORKS)
def test_the_same_ode_in_every_parametrisation(parametrisation: ParametrisationName, steps: int) -> None:
    x = ours(parametrisation, "ddim", (*TIMES[:steps], 0.0), diffusion=True)
    np.testing.assert_allclose(x, ddim_samples(steps), rtol=0, atol=1e-6)


@pytest.mark.parametrize("parametrisation", NETWORKS)
def test_a_sample_is_the_same_to_the_bit_in_any_batch(bundle: Callable[[str, str], Path], parametrisation: str) -> None:
    rng = np.random.default_rng(0)
    with Generator(bundle(parametrisation, "consistency")) as generate:
        for t in rng.uniform(0.01, 1.55, size=25):
            together = generate(seed=list(range(17)), timesteps=[float(t)], output_type="latent").array
            for seed in (0, 8, 16):
                alone = generate(seed=seed, timesteps=[float(t)], output_type="latent").array
                np.testing.assert_array_equal(alone[0], together[seed])


# ----------------------------------------------------------------------------
# Comparison with diffusers, which has its own formulas for three of them.


def draws(count: int) -> list[Tensor]:
    return [torch.from_numpy(noise(k)) for k in range(count)]


def ours(parametrisation: ParametrisationName, solver: Any, times: tuple[float, ...], *, diffusion: bool) -> Tensor:
    step = Step(network(parametrisation, diffusion=diffusion), SIGMA_DATA, parametrisation, solver)
    return sample(step, draws(len(times)), times, SIGMA_DATA, {})


def test_edm_is_diffusers_edm() -> None:
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.2, sigma_max=20.0, sigma_data=SIGMA_DATA, prediction_type="epsilon")
    scheduler.set_timesteps(3)
    x = draws(1)[0] * torch.sqrt(scheduler.sigmas[0].double() ** 2 + SIGMA_DATA**2)
    for t in scheduler.timesteps:
        F = network("edm", diffusion=True)(scheduler.scale_model_input(x, t), t.double().expand(len(x)))
        x = scheduler.step(F, t, x).prev_sample
    times = tuple(math.atan(float(sigma) / SIGMA_DATA) for sigma in scheduler.sigmas)
    torch.testing.assert_close(ours("edm", "ddim", times, diffusion=True), x.double(), rtol=0, atol=2e-6)


def test_flow_is_diffusers_flow_matching() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)  # so that its times are the path's u
    scheduler.set_timesteps(sigmas=[0.97, 0.7, 0.3])
    u = [float(sigma) for sigma in scheduler.sigmas]
    times = tuple(math.atan2(level, 1 - level) for level in u)
    x = draws(1)[0] / (math.cos(times[0]) + math.sin(times[0]))
    for t in scheduler.timesteps:
        v = network("flow", diffusion=True)(x, t.double().expand(len(x)))
        x = scheduler.step(v, t, x).prev_sample
    torch.testing.assert_close(ours("flow", "ddim", times, diffusion=True), x.double() * SIGMA_DATA, rtol=0, atol=2e-6)


@pytest.mark.parametrize("parametrisation", NETWORKS)
def test_the_consistency_step_is_diffusers_scm_scheduler(parametrisation: ParametrisationName) -> None:
    """The scheduler takes sigma_d F, for every parametrisation of the network."""
    scheduler = diffusers.SCMScheduler(prediction_type="trigflow", sigma_data=SIGMA_DATA)
    scheduler.set_timesteps(2, timesteps=[1.55, 1.1, 0.0], max_timesteps=None, intermediate_timesteps=None)
    x, model = draws(1)[0] * SIGMA_DATA, network(parametrisation)
    step = Step(model, SIGMA_DATA, parametrisation)
    for k, t in enumerate(scheduler.timesteps[:-1]):
        times = t.expand(len(x))
        velocity = SIGMA_DATA * PARAMETRISATIONS[parametrisation](model, x, times, SIGMA_DATA)
        denoised = scheduler.step(velocity, t, x, generator=torch.Generator().manual_seed(k), return_dict=False)[1]
        torch.testing.assert_close(step(x, times, torch.zeros(len(x)), x, {}), denoised.double(), rtol=0, atol=1e-6)
        x = denoised.double() * math.cos(1.1) + draws(2)[1] * SIGMA_DATA * math.sin(1.1)


# ----------------------------------------------------------------------------
# The first and the last time.


@pytest.mark.parametrize("t", [math.pi / 2, 1.5708, 1e-3])
@pytest.mark.parametrize("parametrisation", sorted(NETWORKS.keys() - {"edm"}))
def test_the_ends_of_time_are_no_special_case(parametrisation: ParametrisationName, t: float) -> None:
    """In float32, pi/2 and SANA's 1.5708 are above pi/2: the cosine is negative, and flow's u is above 1."""
    x = draws(1)[0] * deviation(t) + math.cos(t) * MEAN
    times = torch.full((len(x),), t)
    step = Step(network(parametrisation).float(), SIGMA_DATA, parametrisation)
    data = step(x.float(), times, torch.zeros(len(x)), x.float(), {})
    expected = MEAN + STD * score(x.numpy(), float(times[0]))
    np.testing.assert_allclose(data, expected, rtol=0, atol=2e-5 if t < 0.1 else 1e-6)


def test_flow_goes_slightly_above_one() -> None:
    levels = []

    def watched(x: Tensor, u: Tensor) -> Tensor:
        levels.append(u)
        return x

    PARAMETRISATIONS["flow"](watched, torch.ones(1, *SHAPE), torch.tensor([1.5708]), SIGMA_DATA)
    assert levels[0].dtype == torch.float32
    assert 1 < levels[0].item() < 1.00001


def test_edm_has_no_infinite_sigma() -> None:
    with pytest.raises(ValueError, match="below pi/2, where sigma is infinite"):
        SamplerSpec(parametrisation="edm", times={"1": (1.5708, 0.0)}).validate()
    SamplerSpec(parametrisation="flow", times={"1": (1.5708, 0.0)}).validate()


def test_a_ddim_step_along_a_rotation_is_exact() -> None:
    """For a single data point and noise, the state rotates from one to the other, and the velocity rotates with it."""
    t, t_next = (torch.tensor(times, dtype=torch.float64) for times in ([1.2, 0.9], [0.3, 0.5]))
    data, normal = torch.randn(2, 2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, x_next = (torch.cos(at).reshape(-1, 1, 1, 1) * data + torch.sin(at).reshape(-1, 1, 1, 1) * normal for at in (t, t_next))
    velocity = torch.cos(t).reshape(-1, 1, 1, 1) * normal - torch.sin(t).reshape(-1, 1, 1, 1) * data
    torch.testing.assert_close(ddim_step(x, velocity / SIGMA_DATA, t, t_next, SIGMA_DATA), x_next, rtol=0, atol=1e-12)
