"""Training checkpoints of a small network of one's own: written, changed byte by byte, and read."""

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
    """Writes a checkpoint, and the config that describes its network."""
    torch.save(content, folder / "run.pt", **options)
    (folder / "config.json").write_text(json.dumps(HEADER))
    return folder / "run.pt"


def taken(path: Path, **options: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The weights that are read, and what is said."""
    said: list[str] = []
    program = load(path, config=path.parent / "config.json", factory="own_networks:plain", progress=said.append, **options)
    assert isinstance(program, Program)
    assert program.weights is not None
    return program.weights, said


def same(found: dict[str, Tensor], seed: int) -> bool:
    expected = weights(seed)
    return found.keys() == expected.keys() and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def raw_pickle(path: Path, state: object, *opcodes: bytes) -> None:
    """A checkpoint {"ema": weights, "beside": what the opcodes leave on the stack}."""
    torch.save({"ema": state, "beside": "HERE"}, path)
    rezip(path, lambda data: data.replace(text("HERE"), b"".join(opcodes)))


def rezip(path: Path, change: Callable[[bytes], bytes]) -> None:
    """The archive with another pickle."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()
