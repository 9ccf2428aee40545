"""Memory of an export: proportional to the weights; the checkpoint file is not changed."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxscript import ir
from safetensors.torch import save_file
from torch import Tensor, nn

from scm_export.checkpoints import Checkpoint, SamplerSpec, load, load_checkpoint, save_checkpoint
from scm_export.families import FAMILIES, build_model
from scm_export.families.weights import load_weights
from scm_export.graphs.trace import trace_map
from scm_export.networks.edm2 import UNet, UNetConfig
from scm_export.precision import Precision
from scm_export.verification.references import LARGE_NETWORK
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.errors import OutOfMemoryError
from support import run_python

onnxruntime = load_onnxruntime()

# The export of a tiny model shows the memory that every export needs; what a second one adds is due to its weights.
# VmHWM, since ru_maxrss starts with the size of the parent process.
MEASURE = """
import json, sys
from pathlib import Path
from typing import Any
from scm_export import export

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

export(sys.argv[1], sys.argv[3] + "/tiny.scm", steps=())
before = peak()
manifest = export(sys.argv[2], sys.argv[3] + "/wide.scm", dtype="fp16").manifest
print(json.dumps({"added": peak() - before, "weights": 4 * manifest.parameters, "composed": manifest.composed_steps}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_export_takes_less_than_twice_the_memory_of_its_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    # A network with 408 MB of weights in few layers: it counts as large and takes a second.
    config = UNetConfig(img_resolution=4, img_channels=3, model_channels=896, channel_mult=(1,), num_blocks=1, attn_resolutions=(), label_dim=0)
    checkpoint = Checkpoint(family="edm2", config=asdict(config), sampler=SamplerSpec(), weights=UNet(config).state_dict())
    save_checkpoint(checkpoint, tmp_path / "wide.pt")
    done = json.loads(run_python(MEASURE, tiny_checkpoint, tmp_path / "wide.pt", tmp_path).stdout.splitlines()[-1])
    assert done["composed"] == [1, 2]  # one graph contains the step twice
    assert done["weights"] > 4 * LARGE_NETWORK
    assert done["added"] < 1.9 * done["weights"]


def test_weights_are_scaled_in_place_and_the_file_keeps_its_own(tiny_checkpoint: Path) -> None:
    before = tiny_checkpoint.read_bytes()
    loaded = load_checkpoint(tiny_checkpoint)
    assert isinstance(loaded, Checkpoint)
    stored = {name: tensor.clone() for name, tensor in loaded.weights.items()}
    folded = build_model(loaded).step.get_parameter("network.enc.8x8_conv.weight")
    assert not torch.equal(folded, stored["enc.8x8_conv.weight"])
    assert tiny_checkpoint.read_bytes() == before
    assert not loaded.weights  # otherwise they would stay in memory


def test_two_names_of_one_tensor_become_two_tensors() -> None:
    first, second, shared = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), torch.randn(3, 3)
    load_weights(nn.Sequential(first, second), {"0.weight": shared, "1.weight": shared})
    with torch.no_grad():
        first.weight *= 2
    assert torch.equal(first.weight, 2 * second.weight)


class Projections(nn.Module):
    """Layers whose weights PyTorch transposes or reshapes before multiplication."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 30)
        self.second = nn.Parameter(torch.randn(30, 3, 7, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x) @ self.second.flatten(1)
        return y


@pytest.mark.parametrize("half", [False, True])
def test_weights_are_stored_as_they_are_multiplied(half: bool) -> None:
    network = Precision(Projections().requires_grad_(False))
    if half:
        network.half()  # stored weights in half precision, cast to float32 in the graph
    x = torch.randn(2, 5, 20)
    model = ir.to_proto(trace_map("map", network, x, "x", "y", 20))
    weights = {tensor.name: tensor for tensor in model.graph.initializer if np.prod(tensor.dims) > 100}
    assert {tuple(tensor.dims) for tensor in weights.values()} == {(20, 30), (30, 21)}
    assert {tensor.data_type for tensor in weights.values()} == {onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT}
    assert {node.op_type for node in model.graph.node if set(weights) & set(node.input)} == {"Cast" if half else "MatMul"}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], network(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("place", ["torch.load", "safe_open", "build"])
def test_exhausted_memory_is_not_called_damage(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 85899345920 bytes.")

    config = {"family": "edm2", "config": {"img_resolution": 8, "img_channels": 3}}
    torch.save({"w": torch.zeros(3)}, tmp_path / "net.pt")
    save_file({"w": torch.zeros(3)}, tmp_path / "net.safetensors")
    file = tmp_path / ("net.safetensors" if place == "safe_open" else "net.pt")
    if place == "torch.load":
        monkeypatch.setattr("torch.load", fail)
    elif place == "safe_open":
        monkeypatch.setattr("scm_export.checkpoints.safetensors_file.safe_open", fail)
    else:
        monkeypatch.setitem(FAMILIES, "edm2", replace(FAMILIES["edm2"], build=fail))
    with pytest.raises(OutOfMemoryError, match=r"out of memory for the (checkpoint|model of) .*Close other programs"):
        build_model(load(file, config=config))
