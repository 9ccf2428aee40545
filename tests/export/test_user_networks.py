"""A researcher's own networks, written as they are in training code: names of inputs, guidance inside the network, control flow, autocast."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import guided_networks
from scm_export import cli
from scm_runtime import Generator, InvalidArgumentError
from scm_runtime.cli.commands import main as runtime
from support import ROOT

NAMES = ("ant", "bee", "cat", "dog")
CLASS = {"name": "y", "kind": "class", "num_classes": 4, "label_names": NAMES}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that writes a network's weights and config, and returns the arguments of scm-export."""

    def write(name: str, *conditioning: Any, **header: Any) -> list[str]:
        torch.manual_seed(0)
        network: nn.Module = getattr(guided_networks, name)()
        torch.save(network.state_dict(), tmp_path / "weights.pt")
        (tmp_path / "config.json").write_text(json.dumps({"config": {"sample_shape": guided_networks.SHAPE}, "conditioning": conditioning, **header}))
        return [str(tmp_path / "weights.pt"), "--config", str(tmp_path / "config.json"), "--factory", f"guided_networks:{name}"]

    return write


def run(arguments: list[str]) -> Any:
    return CliRunner(catch_exceptions=False).invoke(cli.main, arguments)


def test_labels_are_for_the_only_input_of_kind_class(write: Callable[..., list[str]], tmp_path: Path) -> None:
    checkpoint = write("Labelled", CLASS)
    assert run([*checkpoint, "-o", str(tmp_path / "own.scm"), "--steps", "", "--no-verify"]).exit_code == 0
    with Generator(tmp_path / "own.scm") as generate:
        expected = generate(conditioning={"y": [2, 0]}, seed=7).array
        np.testing.assert_array_equal(generate(class_labels=[2, 0], seed=7).array, expected)
        np.testing.assert_array_equal(generate.submit(["cat", "ant"], seed=7).result().array, expected)
        streamed = list(generate.stream(2, 1, class_labels=["cat", "ant"], seed=7))
        np.testing.assert_array_equal(np.concatenate([samples.array for samples in streamed]), expected)
        with pytest.raises(InvalidArgumentError, match="y was given both as an argument and in conditioning"):
            generate(class_labels=1, conditioning={"y": 1})
        with pytest.raises(InvalidArgumentError, match="y must be one of its 4 label names"):
            generate(class_labels="eel")
    done = CliRunner(catch_exceptions=False).invoke(runtime, ["generate", str(tmp_path / "own.scm"), "--labels", "cat,ant", "-o", str(tmp_path / "o.png")])
    assert done.exit_code == 0, done.output


def test_labels_for_several_inputs_of_kind_class_are_refused(write: Callable[..., list[str]], tmp_path: Path) -> None:
    checkpoint = write("TwoLabels", CLASS, {**CLASS, "name": "z"})
    assert run([*checkpoint, "-o", str(tmp_path / "own.scm"), "--steps", "", "--no-verify"]).exit_code == 0
    with Generator(tmp_path / "own.scm") as generate:
        with pytest.raises(InvalidArgumentError, match="class_labels was given, but the bundle 'own' takes y, z"):
            generate(class_labels=1)
        assert len(generate(conditioning={"y": [1, 2], "z": 0})) == 2


# ----------------------------------------------------------------------------
# Classifier-free guidance inside the network.

GUIDED = ({**CLASS, "name": "class_labels"}, {"name": "guidance_scale", "kind": "scalar", "default": 2.0})


@pytest.mark.parametrize("name", ["TwoBranches", "Chunked", "ChunkedByKeyword", "Split", "SplitInHalf"])
def test_a_network_may_compute_both_branches_of_guidance_in_one_batch(write: Callable[..., list[str]], tmp_path: Path, name: str) -> None:
    done = run([*write(name, *GUIDED), "-o", str(tmp_path / "own.scm"), "--steps", "", "--no-verify"])
    assert done.exit_code == 0, done.output
    torch.manual_seed(0)
    network = guided_networks.TwoBranches()
    x, t = torch.randn(3, *guided_networks.SHAPE, generator=torch.Generator().manual_seed(1)), 1.2
    labels, scales = torch.tensor([2, 0, 1]), torch.tensor([1.0, 4.0, 2.0])
    with torch.no_grad(), Generator(tmp_path / "own.scm") as generate:
        F = network(x, torch.full((3,), t), labels, scales)
        expected = 0.5 * (math.cos(t) * x - math.sin(t) * F)
        for n in (1, 3):
            found = generate(labels[:n].numpy(), guidance_scale=scales[:n].tolist(), latents=x[:n].numpy(), timesteps=[t], output_type="latent").array
            np.testing.assert_allclose(found, expected[:n], rtol=0, atol=1e-5)


def test_the_example_in_the_documentation_works(write: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "exporting.md").read_text(), re.DOTALL)
    code = next(text for language, text in blocks if language == "python" and "class Guided" in text)
    config = next(text for language, text in blocks if language == "toml" and "guidance_scale" in text).replace("= 10", "= 4")
    arguments = write("Labelled")
    (tmp_path / "config.toml").write_text(f"[config]\nsample_shape = {list(guided_networks.SHAPE)}\n{config}")
    (tmp_path / "my_guidance.py").write_text(
        f"import torch\nfrom torch import Tensor, nn\nimport guided_networks\n\n{code}\ndef make():\n    return Guided(guided_networks.Labelled(), 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    weights = {f"network.{name}": tensor for name, tensor in torch.load("weights.pt").items()}
    torch.save(weights, "weights.pt")
    done = run([arguments[0], "--config", "config.toml", "--factory", "my_guidance:make", "-o", "own.scm"])
    assert done.exit_code == 0, done.output


def line_of(code: str) -> int:
    """Number of the line in guided_networks.py that contains this code."""
    return next(number for number, line in enumerate(Path(guided_networks.__file__).read_text().splitlines(), 1) if code in line)


@pytest.mark.parametrize(
    ("name", "code", "cause", "remedy"),
    [
        ("SplitByLength", ".split(len(x))", "The network uses its batch size as a number", "Use x.shape[0] without converting it"),
        ("SplitByInt", "n = int(x.shape[0])", "The network uses its batch size as a number", "Use x.shape[0] without converting it"),
        ("Loop", "for i in range(x.shape[0])", "The network uses its batch size as a number", "operate on the whole batch"),
        ("Branch", "if t.max() > 1", "a branch or a Python number depends on the values of a tensor", "choose with torch.where"),
        ("Item", "int(y.sum().item())", "a branch or a Python number depends on the values of a tensor", "choose with torch.where"),
        ("Autocast", "y: Tensor = self.conv(x)", "the network uses torch.autocast on the CPU", "Leave it out"),
    ],
)
def test_a_network_that_cannot_be_traced_is_refused_with_its_line(
    write: Callable[..., list[str]], tmp_path: Path, name: str, code: str, cause: str, remedy: str, capfd: pytest.CaptureFixture[str]
) -> None:
    conditioning = GUIDED if name.startswith("Split") else (CLASS,)
    done = run([*write(name, *conditioning), "-o", str(tmp_path / "own.scm"), "--steps", "", "--no-verify"])
    assert done.exit_code == 1
    message = done.stderr[done.stderr.index("Error:") :]
    assert cause in message
    assert remedy in message
    assert f"{guided_networks.__file__}:{line_of(code)}\n    " in message
    assert code in message
    assert message.count("\n") <= 4
    assert "def forward" not in done.stderr + capfd.readouterr().err  # torch prints its graph
    assert {path.name for path in tmp_path.iterdir()} == {"weights.pt", "config.json"}


def test_an_operator_that_onnx_does_not_have_is_named(write: Callable[..., list[str]], tmp_path: Path) -> None:
    done = run([*write("Untranslatable", CLASS), "-o", str(tmp_path / "own.scm"), "--no-verify"])
    assert done.exit_code == 1
    assert "torch.onnx has no translation of the operator aten.linalg_eig. Use other operators" in done.stderr


def test_autocast_that_changes_nothing_on_a_cpu_is_left_alone(write: Callable[..., list[str]], tmp_path: Path) -> None:
    done = run([*write("AutocastOff", CLASS), "-o", str(tmp_path / "own.scm"), "--steps", "", "--no-verify"])
    assert done.exit_code == 0, done.output


# ----------------------------------------------------------------------------
# Mistakes in the config.


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"sampler": {"parametrisation": "v"}}, "sampler.parametrisation must be one of trigflow, trigflow-negated, edm, flow, x0, got 'v'"),
        ({"sampler": {"parametrisation": "trig-flow"}}, "got 'trig-flow'; did you mean 'trigflow'?"),
        ({"sampler": {"solver": "heun"}}, "sampler.solver must be one of consistency, ddim, got 'heun'"),
        ({"conditioning": [{"name": "y", "kind": "label"}]}, "conditioning.kind must be one of class, scalar, embedding, mask, got 'label'"),
    ],
)
def test_a_value_that_is_none_of_the_choices_is_refused_with_all_of_them(write: Callable[..., list[str]], header: dict[str, Any], message: str) -> None:
    done = run(write("Labelled", **header))
    assert done.exit_code == 1
    assert message in done.stderr
