"""The family ``module`` with networks that use torch.compile, and with networks that cache a table at their first call."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import keeping_networks
from keeping_networks import CLASSES, LINES, NETWORKS, SHAPE, Network, line
from scm_export import export
from scm_export.checkpoints import load
from scm_export.errors import ExportError, VerificationError
from scm_export.families import build_model
from scm_runtime import Generator
from scm_runtime.errors import ScmError
from support import ROOT, run_python

SIGMA_DATA = 0.5
HALF = ("late_buffer", "lru_cache")  # networks whose tables have the dtype of the other summand, or are cast with the weights


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """Clear the cached tables before and after a test."""
    for clear in (line.cache_clear, LINES.clear, keeping_networks.held.clear):
        clear()
    yield
    keeping_networks.held.clear()


def write(folder: Path, kind: str, weights: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Write a checkpoint and its config; return the keywords for ``load`` and ``export``."""
    torch.save(NETWORKS[kind]().state_dict() if weights is None else weights, folder / "weights.pt")
    config = {
        "config": {"sample_shape": SHAPE, "arguments": {"kind": kind}, "keep_fp32": ["enter"]},
        "sampler": {"parametrisation": "trigflow", "sigma_data": SIGMA_DATA},
        "conditioning": [{"name": "class_labels", "kind": "class", "num_classes": CLASSES}],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return {"config": folder / "config.json", "factory": "keeping_networks:make"}


def inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(n)), torch.full((n,), 1.2), torch.arange(n) % CLASSES


@torch.no_grad()
def eager(network: nn.Module, n: int) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        y: Tensor = network(*inputs(n))
    return y


def check_samples(bundle: Path, kind: str) -> None:
    """Assert that a bundle's step matches a newly created network, for batch sizes 1 to 5."""
    fresh = NETWORKS[kind]()
    with Generator(bundle) as generate:
        for n in (1, 2, 3, 5):
            x, level, labels = inputs(n)
            found = generate(labels.tolist(), latents=x.numpy(), timesteps=[level[0].item()], output_type="latent").array
            expected = SIGMA_DATA * (math.cos(1.2) * x - math.sin(1.2) * eager(fresh, n))  # x is already divided by sigma_d
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in NETWORKS if kind not in ("by_batch", "grows", "scripted")])
def test_it_exports_and_can_be_called_afterwards_as_before(kind: str, tmp_path: Path) -> None:
    network = keeping_networks.held[kind] = NETWORKS[kind]()
    names, values = list(network.state_dict()), [tensor.clone() for tensor in network.state_dict().values()]
    bundle = export(tmp_path / "weights.pt", **write(tmp_path, kind), steps=(), verify=False)
    check_samples(bundle.path, kind)
    if kind in HALF:
        export(tmp_path / "weights.pt", tmp_path / "half.scm", **write(tmp_path, kind), dtype="fp16", steps=())
    assert list(network.state_dict()) == names
    for tensor, value in zip(network.state_dict().values(), values, strict=True):
        torch.testing.assert_close(tensor, value, rtol=0, atol=0)
    again = NETWORKS[kind]()
    for n in (2, 5, 1):
        torch.testing.assert_close(eager(network, n), eager(NETWORKS[kind](), n), rtol=0, atol=1e-6)
        torch.testing.assert_close(eager(again, n), eager(NETWORKS[kind](), n), rtol=0, atol=1e-6)
    for dtype in (torch.float16, torch.float32):
        assert not isinstance(line(SHAPE[-1], dtype), FakeTensor)
    assert not any(isinstance(table, FakeTensor) for table in LINES.values())


@pytest.mark.parametrize("verify", [True, False])
def test_a_table_as_long_as_the_batch_is_refused_and_not_fixed_at_one_length(verify: bool, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"(?s)the batch size of step is fixed at 2.*table"):
        export(tmp_path / "weights.pt", **write(tmp_path, "by_batch"), steps=(), verify=verify)
    assert not (tmp_path / "weights.scm").exists()


def test_a_table_of_the_largest_batch_so_far_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"(?s)the step fails for 6 samples.*make that table at every call"):
        export(tmp_path / "weights.pt", **write(tmp_path, "grows"), steps=())
    assert not (tmp_path / "weights.scm").exists()


def test_a_scripted_layer_is_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(ScmError):
        export(tmp_path / "weights.pt", **write(tmp_path, "scripted"), steps=(), verify=False)


@pytest.mark.parametrize("kind", ["compiled", "compiled_layer", "compiled_in_place"])
def test_weights_of_compiled_and_uncompiled_networks_load_into_either(kind: str, tmp_path: Path) -> None:
    weights = NETWORKS[kind]().state_dict()
    assert any("_orig_mod." in name for name in weights) == (kind != "compiled_in_place")
    plain = Network().state_dict()
    for prefix in ("", "module."):
        for given, made in ((weights, "attribute"), (weights, kind), (plain, kind), (weights, "compiled"), (weights, "compiled_layer")):
            changed = {f"{prefix}{name}": tensor * 2 for name, tensor in given.items()}
            model = build_model(load(tmp_path / "weights.pt", **write(tmp_path, made, changed)))
            found = {name.replace("_orig_mod.", "").removeprefix("network.network.network."): tensor for name, tensor in model.step.named_parameters()}
            assert set(found) == set(plain)
            for name, tensor in plain.items():
                torch.testing.assert_close(found[name], tensor * 2, rtol=0, atol=0)


def test_the_command_line_exports_a_compiled_network(tmp_path: Path) -> None:
    options = write(tmp_path, "compiled")
    (tmp_path / "keeping_networks.py").write_text((ROOT / "tests" / "keeping_networks.py").read_text())
    command = ["weights.pt", "--config", options["config"], "--factory", options["factory"], "--steps", ""]
    run_python("from scm_export.cli import main; main()", *command, cwd=tmp_path)  # a segmentation fault gives a negative exit code
    check_samples(tmp_path / "weights.scm", "compiled")
