"""A parametrization that is clearly not the network's is noticed, on a trained network and on exact ones; any that fits, or that nothing can decide, is not."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gaussian_networks
import own_networks
from scm_export import Options, plan
from scm_export.checkpoints import ConditioningSpec, Header, Program, SamplerSpec, load
from scm_export.choices import PARAMETRISATION_NAMES, ParametrisationName
from scm_export.families import build_model
from support import ROOT

SIGMA_DATA = 0.5


@functools.cache
def digits() -> nn.Module:
    """The trained network of examples/digits, which predicts TrigFlow's F."""
    network = build_model(load(ROOT / "examples" / "digits" / "digits.pt")).step.network
    assert isinstance(network, nn.Module)
    return network


class Digits(nn.Module):
    """The digits' network, converted to a network of another parametrization."""

    def __init__(self, convert: Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.F, self.convert = digits(), convert

    def forward(self, x: Tensor, level: Tensor, class_labels: Tensor) -> Tensor:
        return self.convert(functools.partial(self.F, class_labels=class_labels), x, level.reshape(-1, 1, 1, 1))


def as_edm(F: Callable[[Tensor, Tensor], Tensor], x: Tensor, c_noise: Tensor) -> Tensor:
    return -F(x, torch.atan(torch.exp(4 * c_noise) / SIGMA_DATA).flatten())


def as_flow(F: Callable[[Tensor, Tensor], Tensor], h: Tensor, u: Tensor) -> Tensor:
    size = torch.sqrt(u**2 + (1 - u) ** 2)
    return (F(h / size, torch.atan2(u, 1 - u).flatten()) - (1 - 2 * u) / size * h) * size / (1 - 2 * u + 2 * u**2)


def as_x0(F: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    return t.cos() * x - t.sin() * SIGMA_DATA * F(x / SIGMA_DATA, t.flatten())


CONVERSIONS: dict[ParametrisationName, Callable[..., Tensor]] = {
    "trigflow": lambda F, x, t: F(x, t.flatten()),
    "trigflow-negated": lambda F, x, t: -F(x, t.flatten()),
    "edm": as_edm,
    "flow": as_flow,
    "x0": as_x0,
}


def warning(caplog: pytest.LogCaptureFixture, network: nn.Module, shape: tuple[int, ...], given: ParametrisationName, *conditioning: ConditioningSpec) -> str:
    caplog.clear()
    header = Header(config={"sample_shape": list(shape)}, sampler=SamplerSpec(parametrisation=given), conditioning=conditioning)
    with caplog.at_level(logging.WARNING, "scm_export"):
        model = build_model(Program(header, network, "the network"))
    assert f"the parametrization {given!r} is taken from the config or --parametrisation on trust" in model.notes[0]
    return caplog.text


@pytest.mark.parametrize("true", PARAMETRISATION_NAMES)
def test_a_wrong_parametrization_of_a_trained_network_is_noticed_and_the_right_one_named(true: ParametrisationName, caplog: pytest.LogCaptureFixture) -> None:
    labels = ConditioningSpec(name="class_labels", kind="class", num_classes=10)
    for given in PARAMETRISATION_NAMES if true == "trigflow" else (true, "trigflow"):
        text = warning(caplog, Digits(CONVERSIONS[true]), (1, 28, 28), given, labels)
        if given == true:
            assert not text
        else:
            assert f"probably not {given!r} but {true!r}" in text
            assert f"--parametrisation {true}" in text


@pytest.mark.parametrize("diffusion", [False, True])
@pytest.mark.parametrize("name", PARAMETRISATION_NAMES)
def test_an_exact_network_is_not_suspected(name: ParametrisationName, diffusion: bool, caplog: pytest.LogCaptureFixture) -> None:
    network = gaussian_networks.make(name, diffusion)
    network.load_state_dict({"mean": torch.tensor(0.3), "std": torch.tensor(0.2)})
    assert not warning(caplog, network, (3, 8, 8), name)


class Scaled(nn.Module):
    """Returns its input times a number: 0 is a network that was not trained, 1 adds noise with TrigFlow's formulas."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.factor * x


def test_networks_that_do_not_denoise(caplog: pytest.LogCaptureFixture) -> None:
    assert "the network does not denoise: it leaves 138%" in warning(caplog, Scaled(1.0), (3, 8, 8), "trigflow")
    assert "samples have a root mean square of 0.00" in warning(caplog, Scaled(0.0), (3, 8, 8), "trigflow")
    torch.manual_seed(0)
    assert not warning(caplog, own_networks.Plain(), own_networks.SHAPE, "trigflow")


def test_a_plan_and_a_large_network_are_not_tested(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with caplog.at_level(logging.WARNING, "scm_export"):
        plan(Scaled(1.0), tmp_path / "out.scm", Options(config={"config": {"sample_shape": [3, 8, 8]}}))
    assert not caplog.text
    monkeypatch.setattr("scm_export.families.module.MAX_TESTED", 0)
    assert not warning(caplog, Scaled(1.0), (3, 8, 8), "trigflow")
