"""The scm-checkpoint format in its two containers, .pt and .safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scm_export.checkpoints import load_checkpoint, save_checkpoint


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_checkpoint_comes_back_as_it_was_saved(tiny_checkpoint: Path, tmp_path: Path, ending: str) -> None:
    original = load_checkpoint(tiny_checkpoint)
    original.weights["out_gain"] = original.weights["out_gain"].half()
    path = tmp_path / f"again{ending}"
    save_checkpoint(original, path)
    again = load_checkpoint(path)
    assert (again.family, again.sampler, again.label_names) == (original.family, original.sampler, original.label_names)
    assert json.dumps(again.config) == json.dumps(original.config)
    assert again.weights.keys() == original.weights.keys()
    for name, tensor in original.weights.items():
        assert again.weights[name].dtype == tensor.dtype
        assert torch.equal(again.weights[name], tensor)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_loading_a_pt_file_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]  # a malformed file may hold any object

    torch.save({"format": "scm-checkpoint", "weights": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="run code"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
