"""Writes, modifies and reads training checkpoints of a small custom network."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from own_networks import SHAPE, Plain
from scm_export.checkpoints import Program, load

SIGMA_DATA, T = 0.5, 1.2
HEADER = {"config": {"sample_shape": SHAPE}, "sampler": {"sigma_data": SIGMA_DATA, "times": {"1": [T, 0]}}}


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Plain().eval().requires_grad_(False)


def weights(seed: int) -> dict[str, Tensor]:
    return network(seed).state_dict()


RAW, AVERAGE = 1, 2  # seeds


def save(folder: Path, content: object, **options: Any) -> Path:
    """Write a checkpoint and the config that describes its network. Returns the checkpoint's path."""
    torch.save(content, folder / "run.pt", **options)
    (folder / "config.json").write_text(json.dumps(HEADER))
    return folder / "run.pt"


def taken(path: Path, **options: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Load a checkpoint. Returns its weights and the progress messages."""
    said: list[str] = []
    program = load(path, config=path.parent / "config.json", factory="own_networks:plain", progress=said.append, **options)
    assert isinstance(program, Program)
    assert program.weights is not None
    return program.weights, said


def same(found: dict[str, Tensor], seed: int) -> bool:
    expected = weights(seed)
    return found.keys() == expected.keys() and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def raw_pickle(path: Path, state: object, *opcodes: bytes) -> None:
    """Write a checkpoint {"ema": state, "beside": the object that the opcodes leave on the stack}."""
    torch.save({"ema": state, "beside": "HERE"}, path)
    rezip(path, lambda data: data.replace(text("HERE"), b"".join(opcodes)))


def rezip(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace an archive's pickle by ``change`` of it."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data
