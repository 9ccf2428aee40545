"""A researcher's own networks, written as they are in training code: names of inputs, guidance inside the network, control flow, autocast."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import guided_networks
from scm_export import cli, export
from scm_runtime import Generator, InvalidArgumentError
from scm_runtime.cli.commands import main as runtime

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
