"""``export(network, ...)``: an ``nn.Module`` in memory becomes a bundle, and is as it was before."""

from __future__ import annotations

import copy
import functools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import guided_networks
from scm_export import Options, export, plan
from scm_export.errors import CheckpointError
from scm_runtime import Generator, InvalidArgumentError, ScmError
from support import ROOT

CONFIG: dict[str, Any] = {
    "config": {"sample_shape": guided_networks.SHAPE},
    "conditioning": [{"name": "y", "kind": "class", "num_classes": 4}],
    "licence": "Apache-2.0",
}


class Buffered(guided_networks.Labelled):
    """In training mode, with weights in half precision and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Buffer(torch.full((3, 1, 1), 0.25))
        self.dropout = nn.Dropout(0.5)
        self.conv.half()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.network(self.dropout(x.to(self.conv.weight.dtype)), t, y).float() + self.offset


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_network_in_memory_is_exported_and_stays_as_it_is(dtype: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Buffered()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    pointers = {name: parameter.data_ptr() for name, parameter in network.named_parameters()}
    done = export(network, tmp_path / "own.scm", config=CONFIG, dtype=dtype, steps=())
    assert done.manifest.verification is not None
    assert (done.manifest.source.file, done.manifest.licence, done.manifest.name) == ("Buffered", "Apache-2.0", "own")
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert {name: parameter.data_ptr() for name, parameter in network.named_parameters()} == pointers
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == before[name].dtype
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    x, t, labels = torch.randn(2, *guided_networks.SHAPE), 1.2, torch.tensor([3, 1])
    with torch.no_grad(), Generator(tmp_path / "own.scm") as generate:
        F = copy.deepcopy(network).float().eval()(x, torch.full((2,), t), labels)
        found = generate(labels.numpy(), latents=x.numpy(), timesteps=[t], output_type="latent").array
    np.testing.assert_allclose(found, 0.5 * (math.cos(t) * x - math.sin(t) * F), rtol=0, atol=1e-5 if dtype == "fp32" else 1e-2)


def test_the_fingerprint_follows_from_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = guided_networks.Labelled()
    first = plan(network, tmp_path / "own.scm", Options(config=CONFIG)).source.sha256
    assert plan(copy.deepcopy(network), tmp_path / "own.scm", Options(config=CONFIG)).source.sha256 == first
    with torch.no_grad():
        network.conv.weight += 1
    assert plan(network, tmp_path / "own.scm", Options(config=CONFIG)).source.sha256 != first
    assert not (tmp_path / "own.scm").exists()


class TenClasses(guided_networks.Base):
    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(10, 3)

    def forward(self, x: Tensor, level: Tensor, class_labels: Tensor) -> Tensor:
        return self.network(x, level, class_labels)


def test_the_example_in_the_documentation_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "exporting.md").read_text(), re.DOTALL)
    example = next(block for block in blocks if "export(network" in block)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/exporting.md", "exec"), {"network": TenClasses(), "export": functools.partial(export, steps=(), verify=False)})
    assert (tmp_path / "model.scm" / "scm.json").is_file()


class Uncopied(guided_networks.Labelled):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError("it holds a socket")


@pytest.mark.parametrize(
    ("network", "options", "error", "message"),
    [
        (guided_networks.Labelled, {"out": None, "config": CONFIG}, InvalidArgumentError, "out, the folder of the bundle, must be given"),
        (guided_networks.Labelled, {}, CheckpointError, "give config, a file or a dict .*\\[config\\]\nsample_shape = "),
        (guided_networks.Labelled, {"config": CONFIG, "factory": "a:b"}, InvalidArgumentError, "factory was given, but it is for files"),
        (guided_networks.Labelled, {"config": CONFIG, "weights": "ema"}, InvalidArgumentError, "weights was given, but it is for files"),
        (guided_networks.Labelled, {"config": CONFIG, "parametrisation": "v"}, InvalidArgumentError, "parametrisation must be one of trigflow, "),
        (guided_networks.Labelled, {"config": {"confg": {}}}, CheckpointError, "the config: unknown field `confg`; did you mean 'config'"),
        (guided_networks.Labelled, {"config": {**CONFIG, "conditioning": []}}, CheckpointError, "the network Labelled cannot be called as network"),
        (guided_networks.Labelled, {"config": {**CONFIG, "family": "edm2"}}, ScmError, "family"),
        (Uncopied, {"config": CONFIG}, CheckpointError, "cannot be copied with copy.deepcopy.*with a factory"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    network: type[nn.Module], options: dict[str, Any], error: type[ScmError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        export(network(), **{"out": tmp_path / "own.scm", **options})
    assert list(tmp_path.iterdir()) == []
