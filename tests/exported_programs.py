"""A small ``.pt2`` program, and changes to the JSON in it."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from own_networks import SHAPE

Raw = dict[str, Any]


class Small(nn.Module):
    """A network with a parameter, a buffer and a constant: every kind of name in a program."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("shift", torch.randn(3, 1, 1))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        high, low = torch.chunk(x, 2, dim=2)
        y = self.conv(torch.cat([low, high], dim=2)) * torch.tensor([2.0, 3.0, 4.0])[:, None, None]
        return torch.add(y, self.shift, alpha=2) * level.reshape(-1, 1, 1, 1)


def save_small(folder: Path) -> Path:
    """Write the program, and the config that describes it."""
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", max=1024)
    program = torch.export.export(Small().eval(), (torch.randn(2, *SHAPE), torch.rand(2)), dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, folder / "small.pt2")
    (folder / "config.json").write_text(json.dumps({"config": {"sample_shape": SHAPE}}))
    return folder / "small.pt2"


def rewritten(saved: Path, target: Path, change: Callable[[str, Any], Any] = lambda name, raw: raw, rename: Mapping[str, str] | None = None) -> Path:
    """Copy an archive with changed JSON files and renamed entries."""
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(target, "w") as out:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith(".json"):
                data = json.dumps(change(name, json.loads(data))).encode()
            parts = [(rename or {}).get(part, part) for part in name.split("/")]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # zipfile warns about duplicate names
                out.writestr("/".join(parts), data)
    return target


def nodes(raw: Raw) -> list[Raw]:
    return raw["graph_module"]["graph"]["nodes"]  # type: ignore[no-any-return]  # parsed JSON has no known type


def node(raw: Raw, operator: str) -> Raw:
    return next(item for item in nodes(raw) if operator in item["target"])


def changed(saved: Path, target: Path, change: Callable[[Raw], object]) -> Path:
    def edit(name: str, raw: Raw) -> Raw:
        if name.endswith("models/model.json"):
            change(raw)
        return raw

    return rewritten(saved, target, edit)


def call(target: str, output: str, *inputs: Any, **keywords: Any) -> Raw:
    """A node of a program. A text as an argument is the name of a tensor."""
    given = [{"name": "", "arg": _argument(value), "kind": 1} for value in inputs]
    given += [{"name": name, "arg": _argument(value), "kind": 2} for name, value in keywords.items()]
    return {"target": f"torch.ops.aten.{target}", "inputs": given, "outputs": [{"as_tensor": {"name": output}}]}


def _argument(value: Any) -> Raw:
    match value:
        case None:
            return {"as_none": True}
        case bool():
            return {"as_bool": value}
        case int():
            return {"as_int": value}
        case float():
            return {"as_float": value}
        case str():
            return {"as_tensor": {"name": value}}
        case [str(), *_]:
            return {"as_tensors": [{"name": name} for name in value]}
    return {"as_ints": value}
