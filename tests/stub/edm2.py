"""Bundles of EDM2 with random weights.

python -m stub.edm2 XXS fp16 FOLDER
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal, cast

Dtype = Literal["fp32", "fp16", "bf16"]
Export = Callable[[Dtype], Path]


def export_preset(preset: str, dtype: Dtype, folder: Path) -> Path:
    """Export a preset of EDM2 into a folder, which keeps its checkpoint for other dtypes. Returns the bundle.

    The export has a process of its own: in this one, torch takes the stub for a GPU (``torch_cuda``), and would compute on it.
    """
    subprocess.run([sys.executable, "-P", "-m", "stub.edm2", preset, dtype, os.fspath(folder)], check=True)
    return _bundle(preset, dtype, folder)


def _bundle(preset: str, dtype: Dtype, folder: Path) -> Path:
    return folder / f"{preset}-{dtype}.scm"


def _export(preset: str, dtype: Dtype, folder: Path) -> None:
    from scm_export import export
    from scm_export.checkpoints import Checkpoint, SamplerSpec, save_checkpoint
    from scm_export.networks.edm2 import PRESETS, UNet

    checkpoint = folder / f"{preset}.pt"
    if not checkpoint.exists():
        config = PRESETS[preset]
        save_checkpoint(Checkpoint(family="edm2", config=asdict(config), sampler=SamplerSpec(), weights=UNet(config).state_dict()), checkpoint)
    export(checkpoint, _bundle(preset, dtype, folder), dtype=None if dtype == "fp32" else dtype, latents=True, verify=False)


if __name__ == "__main__":
    _export(sys.argv[1], cast(Dtype, sys.argv[2]), Path(sys.argv[3]))
